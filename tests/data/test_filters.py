import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from ldm.data.order.buckets import AspectRatios, Sizes, Table
from ldm.data.order.filters import Filter
from ldm.data.order.selection import SelectionRequest, select
from ldm.data.shards.index import Manifest, load_manifest
from ldm.data.shards.write import write_shard
from ldm.errors import UserError
from tests.data.make import picture


class Numbers:
    """Columns in memory."""

    def __init__(self, **columns: list[float]) -> None:
        self.read = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.read)

    def column(self, name: str) -> np.ndarray:
        return self.read[name]

    def __len__(self) -> int:
        return len(next(iter(self.read.values())))


NAN = float("nan")
NUMBERS = Numbers(AESTHETIC_SCORE=[4, 5, 6, NAN], width=[100, 200, 300, 400], punsafe=[0.1, NAN, 0.9, 0.2])


def kept(text: str, numbers: Numbers = NUMBERS) -> list[int]:
    where = Filter(text)
    masks = where.masks(numbers, where.resolve(numbers), 0, len(numbers))
    return np.flatnonzero(np.logical_and.reduce(masks)).tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AESTHETIC_SCORE > 5.0", [2]),
        ("aesthetic_score >= 5 and width < 300", [1]),
        ("aesthetic > 4.5 or width == 400", [1, 2, 3]),
        ("200 <= width <= 300", [1, 2]),
        ("not width > 200", [0, 1]),
        ("punsafe != 0.1", [2, 3]),
        ("punsafe <= 0.5", [0, 3]),
        ("not punsafe > 0.5", [0, 1, 3]),
        ("has(punsafe)", [0, 2, 3]),
        ("not has(aesthetic)", [3]),
        ("width / 100 - 1 < -(-2) * 1", [0, 1]),
        ("(width + 100) > 350 and (has(punsafe) or width > 1)", [2, 3]),
        ("width > 0 * punsafe", [0, 2, 3]),
        ("1 < 2", [0, 1, 2, 3]),
    ],
)
def test_an_expression_keeps_what_it_says(text: str, expected: list[int]) -> None:
    assert kept(text) == expected


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("width >", 7),
        ("width > 5 AND height > 3", 10),
        ("width = 5", 6),
        ("width", 0),
        ("width > 5 and height", 14),
        ("__import__('os').system('true') == 0", 0),
        ("width.real > 3", 0),
        ("(lambda: width)() > 3", 1),
        ("[w for w in width] > 3", 0),
        ("width ** 99 > 3", 0),
        ("width > 'a'", 8),
        ("width > True", 8),
        ("has(3)", 0),
        ("width in (1, 2)", 0),
        ("(width > 3) > 2", 1),
    ],
)
def test_what_the_grammar_does_not_have_is_shown_at_its_place(text: str, place: int) -> None:
    with pytest.raises(UserError) as told:
        Filter(text)
    lines = str(told.value).splitlines()
    assert lines[1] == f"  {text}" and lines[2].index("^") - 2 == pytest.approx(place, abs=1)


def test_deep_and_long_filters_are_refused_in_time() -> None:
    for text in ("(" * 5000 + "1" + ")" * 5000 + " < 2", "not " * 2400 + "width > 1", "width > 1 and " * 2000):
        with pytest.raises(UserError, match="filter"):
            Filter(text)


def test_an_unknown_column_is_named_with_the_nearest_ones() -> None:
    with pytest.raises(UserError, match=r"(?s)did you mean width.*\n  punsafe < 1 and widht > 3\n {18}\^"):
        kept("punsafe < 1 and widht > 3")


def test_spelling_follows_stated_rules() -> None:
    numbers = Numbers(**{"Clip-Score": [1, 2], "aesthetic": [5, 6], "a.b": [0, 1], "A_B": [1, 0]})
    assert kept("clip_score > 1", numbers) == [1]
    assert kept("AESTHETIC_SCORE > 5", numbers) == [1]
    assert kept("A_B > 0", numbers) == [0]  # as it is written
    with pytest.raises(UserError, match=r"a_b may be a.b or A_B"):
        kept("a_b > 0", numbers)


def manifest(folder: Path, sizes: list[tuple[int, int]], **numbers: list[float]) -> Manifest:
    """Samples of (width, height), described in the JSON alone."""
    samples = []
    for i, (width, height) in enumerate(sizes):
        facts = {"width": width, "height": height, "caption": "x"} | {n: v[i] for n, v in numbers.items()}
        samples.append((f"{i:05d}", {"png": picture(0), "json": json.dumps(facts).encode()}))
    write_shard(folder / "a.tar", samples)
    return load_manifest(folder)


def test_kept_and_dropped_are_counted_per_rule(tmp_path: Path) -> None:
    found = manifest(tmp_path, [(10 * i, 50) for i in range(1, 11)], score=list(range(10)))
    source = SelectionRequest("train", found, Filter("width > 30 and (score < 8 or score > 99) and height >= 50"))
    for _ in range(2):  # the second from the file
        _, (selection,) = select([source])
        assert selection.rules == [
            ("width > 30", 7, 3),
            ("score < 8 or score > 99", 5, 2),
            ("height >= 50", 5, 0),
        ]
        assert [selection[i] for i in range(len(selection))] == [3, 4, 5, 6, 7]
    sent = pickle.loads(pickle.dumps(selection))
    assert [sent[i] for i in range(5)] == [3, 4, 5, 6, 7] and sent.rules == selection.rules


def test_a_filter_that_keeps_nothing_is_told_with_its_counts(tmp_path: Path) -> None:
    found = manifest(tmp_path, [(10, 10)] * 4)
    with pytest.raises(UserError, match=r"(?s)train: no sample is left of 4.*width > 5: 0 dropped, 4 kept.*4 dropped"):
        select([SelectionRequest("train", found, Filter("width > 5 and height > 50"))])


def test_without_filter_and_buckets_nothing_is_written(tmp_path: Path) -> None:
    found = manifest(tmp_path, [(10, 10)] * 4)
    sizes, (selection,) = select([SelectionRequest("train", found)], size=(16, 16))
    assert sizes == [(16, 16)] and selection.counts == [4] and selection[3] == 3
    assert not (found.folder / "selections").exists()


SDXL = [
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
]  # fmt: skip


def test_the_sizes_at_1024_are_sdxls() -> None:
    assert set(AspectRatios().sizes((1024, 1024))) == {*SDXL, *((w, h) for h, w in SDXL)}
    for size in AspectRatios(step=32, max_ratio=2).sizes((256, 256)):
        assert size[0] % 32 == size[1] % 32 == 0 and 0.9 * 65536 <= size[0] * size[1] <= 65536
        assert max(size) <= 2 * min(size)
    with pytest.raises(UserError, match="make step smaller"):
        AspectRatios(step=48).sizes((64, 64))


def test_samples_go_to_the_nearest_aspect_ratio(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sides = [(int(w), int(h)) for w, h in rng.integers(50, 400, (300, 2))]
    sides.append((16, 16))  # the last says nothing; it has the picture's size
    found = manifest(tmp_path, [*sides[:-1], (0, 10)])
    buckets = Sizes([[64, 64], [32, 128], [96, 40], [128, 32]])
    sizes, (selection,) = select([SelectionRequest("train", found)], buckets, (64, 64), minimum=5)
    ratios = np.log([h / w for h, w in sizes])
    place = 0
    for bucket, count in enumerate(selection.counts):
        for _ in range(count):
            width, height = sides[selection[place]]
            distances = np.abs(np.log(height / width) - ratios)
            assert distances[bucket] == distances.min()
            place += 1
    assert place == 301 and selection.rules == [("width and height are known", 301, 0)]


def test_small_generated_buckets_give_their_samples_to_the_nearest(tmp_path: Path) -> None:
    found = manifest(tmp_path, [(64, 64)] * 20 + [(128, 32)] * 3 + [(32, 128)] * 8)
    sizes, (selection,) = select([SelectionRequest("t", found)], AspectRatios(step=16), (64, 64), minimum=8)
    assert len(sizes) == 2 and selection.counts == [23, 8]
    assert [selection[i] for i in range(23, 31)] == list(range(23, 31))


def test_a_listed_bucket_without_enough_samples_is_refused_with_the_counts(tmp_path: Path) -> None:
    found = manifest(tmp_path, [(64, 64)] * 20)
    with pytest.raises(UserError, match=r"needs a global batch of samples, 8; .*32 x 128: 0, 64 x 64: 20"):
        select([SelectionRequest("t", found)], Sizes([[64, 64], [32, 128]]), (64, 64), minimum=8)
    for wrong in ([], [[3]], [[0, 4]], [[64, 64], [32, 32]]):
        with pytest.raises(UserError, match="buckets"):
            Sizes(wrong)


def test_a_table_counts_any_choice_of_sizes() -> None:
    sizes = [(h, w) for h, w in AspectRatios(step=16, max_ratio=4).sizes((64, 64))]
    ratios = np.random.default_rng(1).normal(0, 1, 2000)
    table = Table(sizes)
    table.counts = [table.count(ratios)]
    for kept_sizes in ([0], [0, 3], [1, 2, 4], list(range(len(sizes)))):
        logs = np.log([sizes[i][0] / sizes[i][1] for i in kept_sizes])
        nearest = np.abs(ratios[:, None] - logs).argmin(1)
        assert table.samples(kept_sizes)[0].tolist() == np.bincount(nearest, minlength=len(kept_sizes)).tolist()
