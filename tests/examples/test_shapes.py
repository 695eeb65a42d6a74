"""The captioned shapes: words and pictures agree, bytes repeat, and no combination leaks into training."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ldm.errors import UserError
from ldm.examples.shapes import (
    AREAS,
    Pair,
    Single,
    caption,
    coverage,
    draw,
    held_out,
    main,
    pairs,
    parse,
    singles,
    splits,
    write,
)

WHERE = {
    "at the upper left": (0.25, 0.25), "at the top": (0.5, 0.25), "at the upper right": (0.75, 0.25),
    "at the left": (0.25, 0.5), "in the centre": (0.5, 0.5), "at the right": (0.75, 0.5),
    "at the lower left": (0.25, 0.75), "at the bottom": (0.5, 0.75), "at the lower right": (0.75, 0.75),
}  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.tar"))
    }


@pytest.mark.parametrize("combinations", [singles(), pairs()])
def test_parse_inverts_caption(combinations: list[Single] | list[Pair]) -> None:
    captions = [caption(what) for what in combinations]
    assert len(set(captions)) == len(captions)
    assert [parse(text) for text in captions] == combinations


def test_captions_read_well() -> None:
    assert caption(Single("large", "red", "circle", "at the upper left")) == "a large red circle at the upper left"
    assert caption(Pair("yellow", "circle", "below", "orange", "square")) == "a yellow circle below an orange square"


@pytest.mark.parametrize(
    "text",
    ["", "a red circle", "a large red circle at the upper left.", "a orange cross above a red star",
     "a red cross above a red star"],
)  # fmt: skip
def test_other_captions_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a caption"):
        parse(text)


@pytest.mark.parametrize("relations", [False, True])
def test_a_tenth_is_held_out_and_every_word_stays_frequent_in_training(relations: bool) -> None:
    train, val, unseen = splits(10, 10, 64, 0, relations)
    assert not set(train.combinations) & set(unseen.combinations)
    assert val.combinations == train.combinations
    assert 0.07 < len(unseen.combinations) / len(singles() if not relations else pairs()) < 0.13
    for name in Single.__annotations__ if not relations else Pair.__annotations__:
        words = Counter(getattr(what, name) for what in train.combinations)
        assert min(words.values()) > 0.75 * len(train.combinations) / len(words)


def test_both_tellings_of_a_picture_are_held_out_together() -> None:
    assert all(held_out(what) == held_out(what.mirrored()) for what in pairs())
    assert all(what.mirrored().mirrored() == what for what in pairs())


@pytest.mark.parametrize("shape", AREAS)
def test_a_shape_covers_its_area_around_its_centroid(shape: str) -> None:
    cover = coverage(shape, 0.47, 0.52, 0.3, 512)
    axis = (np.arange(512) + 0.5) / 512
    total = cover.sum()
    assert total / 512**2 == pytest.approx(AREAS[shape] * 0.3**2, rel=0.005)
    assert (cover.sum(0) @ axis) / total == pytest.approx(0.47, abs=1e-3)
    assert (cover.sum(1) @ axis) / total == pytest.approx(0.52, abs=1e-3)


def test_the_object_stands_where_the_caption_says_and_inside_the_picture() -> None:
    generator = np.random.default_rng(0)
    for what in singles()[::7]:
        picture = draw(what, 64, generator).astype(float)
        background = np.median(picture[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
        y, x = np.nonzero(np.abs(picture - background).max(axis=-1) > 60)
        assert min(x.min(), y.min()) > 0 and max(x.max(), y.max()) < 63
        at = (x.min() + x.max() + 1) / 128, (y.min() + y.max() + 1) / 128
        assert at == pytest.approx(WHERE[what.position], abs=0.1)


def test_the_relation_is_drawn_as_told() -> None:
    """The red object lies in the half that the caption says, the blue one in the other."""
    for relation, axis, half in (
        ("above", 0, 0), ("below", 0, 1), ("to the left of", 1, 0), ("to the right of", 1, 1),
    ):  # fmt: skip
        what = Pair("red", "circle", relation, "blue", "square")
        picture = draw(what, 64, np.random.default_rng(1)).astype(int)
        redder = picture[..., 0] - picture[..., 2]
        halves = np.split(redder, 2, axis=axis)
        assert halves[half].max() > 100 and halves[1 - half].max() < 50
        assert halves[half].min() > -50 and halves[1 - half].min() < -100


def test_an_image_is_a_function_of_its_address() -> None:
    one, more = splits(5, 5, 64, 3, False)[0], splits(500, 9, 64, 3, False)[0]
    assert np.array_equal(one.image(4), more.image(4))
    assert not np.array_equal(one.image(4), one.image(3))
    assert not np.array_equal(one.image(4), splits(5, 5, 64, 4, False)[0].image(4))
    backgrounds = {tuple(split.image(4)[0, 0]) for split in splits(5, 5, 64, 3, False)}
    assert len(backgrounds) == 3


def test_shards_are_webdataset_and_their_bytes_repeat(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert write(tmp_path / name, train=7, val=3, size=32, per_shard=4)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert sorted(digests(tmp_path / "a")) == [
        "held_out/00000.tar", "train/00000.tar", "train/00001.tar", "val/00000.tar",
    ]  # fmt: skip
    shards = [str(tmp_path / "a" / "train" / f"{i:05d}.tar") for i in range(2)]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    split = splits(7, 3, 32, 0, False)[0]
    assert len(samples) == 7
    for i, sample in enumerate(samples):
        assert np.array_equal(sample["png"], split.image(i))
        assert sample["txt"] == sample["json"]["caption"] == caption(split.combination(i))
        assert Single(**sample["json"]["attributes"]) == split.combination(i)
        assert sample["json"]["width"] == 32


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "whole", train=9, val=2, size=32, per_shard=3)
    write(tmp_path / "stopped", train=9, val=2, size=32, per_shard=3)
    (tmp_path / "stopped" / "shapes.json").rename(tmp_path / "stopped" / "shapes.partial.json")
    (tmp_path / "stopped" / "train" / "00001.tar").unlink()
    kept = (tmp_path / "stopped" / "train" / "00000.tar").stat().st_mtime_ns
    assert write(tmp_path / "stopped", train=9, val=2, size=32, per_shard=3)
    assert digests(tmp_path / "whole") == digests(tmp_path / "stopped")
    assert (tmp_path / "stopped" / "train" / "00000.tar").stat().st_mtime_ns == kept


def test_the_command_skips_what_is_complete_and_refuses_what_is_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    few = [str(out), "--train", "3", "--val", "2", "--size", "32"]
    assert main(few) == 0
    assert json.loads((out / "shapes.json").read_text())["train"] == 3
    assert main(few) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*few, "--seed", "1"]) == 1
    assert "other parameters" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main([str(tmp_path / "mine")]) == 1
