import json
from collections import Counter
from pathlib import Path

import pytest

from ldm.data.loading.caption_choice import CaptionChoice, MAX_caption_bytes
from ldm.data.loading.fetch import Fetcher, View
from ldm.data.shards.index import load_manifest
from ldm.data.shards.picture import BadSample
from ldm.data.shards.write import write_shard
from ldm.errors import UserError
from tests.data.make import picture

PARTS = [
    {"txt": b"text", "json": json.dumps({"alt": "other", "many": ["a", "b", "c"]}).encode()},
    {"json": json.dumps({"alt": " other "}).encode()},
    {"txt": b"text"},
    {"json": b"{}"},
]


def fetcher(folder: Path, choice: CaptionChoice, parts: list[dict[str, bytes]] = PARTS) -> Fetcher:
    if not (folder / "a.tar").exists():
        write_shard(folder / "a.tar", [(f"{i}", {"png": picture(0), **part}) for i, part in enumerate(parts)])
    return Fetcher(load_manifest(folder), View.of(16), seed=3, captions=choice)


def drawn(fetcher: Fetcher, index: int, visits: int = 600) -> Counter[str]:
    return Counter(fetcher.caption(index, epoch) for epoch in range(visits))


def test_fields_are_drawn_by_their_weights_from_the_visits_address(tmp_path: Path) -> None:
    choice = CaptionChoice({"txt": 8, "json.alt": 1.5, "empty": 0.5})
    found = drawn(fetcher(tmp_path, choice), 0)
    assert found.keys() == {"text", "other", ""}
    assert abs(found["text"] - 480) < 40 and abs(found["other"] - 90) < 36 and abs(found[""] - 30) < 22
    again, other_seed = fetcher(tmp_path, choice), fetcher(tmp_path, choice)
    other_seed.seed = 4
    first = [again.caption(0, epoch) for epoch in range(100)]
    assert Counter(first) != found and first == [fetcher(tmp_path, choice).caption(0, e) for e in range(100)]
    assert first != [other_seed.caption(0, epoch) for epoch in range(100)]


def test_a_field_that_a_sample_lacks_leaves_its_weight_to_the_others_but_empty(tmp_path: Path) -> None:
    choice = CaptionChoice({"txt": 0.6, "json.alt": 0.2, "empty": 0.2})
    found = fetcher(tmp_path, choice)
    assert abs(drawn(found, 1)[""] - 120) < 45 and drawn(found, 1).keys() == {"other", ""}
    assert abs(drawn(found, 2)[""] - 120) < 45 and drawn(found, 2).keys() == {"text", ""}
    with pytest.raises(BadSample, match="no caption"):
        for epoch in range(50):
            found.caption(3, epoch)
    silent = fetcher(tmp_path, CaptionChoice({"txt": 1}, required=False))
    assert silent.caption(3) == ""


def test_a_list_of_texts_gives_one_of_them(tmp_path: Path) -> None:
    found = drawn(fetcher(tmp_path, CaptionChoice({"json.many": 1})), 0)
    assert found.keys() == {"a", "b", "c"} and min(found.values()) > 130


def test_a_field_that_no_sample_has_is_refused_with_the_nearest(tmp_path: Path) -> None:
    fetcher(tmp_path, CaptionChoice({"json.alt": 1})).check_captions()
    with pytest.raises(UserError, match=r"no sample's JSON has a text 'atl'; did you mean alt"):
        fetcher(tmp_path, CaptionChoice({"json.atl": 1})).check_captions()


@pytest.mark.parametrize("weights", [{"text": 1}, {"json.": 1}, {"txt": -1}, {"txt": 0}, {}, {"txt": float("nan")}])
def test_fields_and_weights_that_are_none_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match="captions: "):
        CaptionChoice(weights)


@pytest.mark.parametrize("choice", [CaptionChoice(), CaptionChoice({"txt": 1, "json.caption": 1})])
def test_long_captions_are_bad_and_long_parts_not_read(tmp_path: Path, choice: CaptionChoice) -> None:
    long = "x" * 1_000_000
    parts: list[dict[str, bytes]] = [{"txt": long.encode()}, {"json": json.dumps({"caption": long}).encode()}]
    found = fetcher(tmp_path, choice, parts)
    for index in range(2):
        with pytest.raises(BadSample, match="caption too long"):
            for epoch in range(9):
                found.caption(index, epoch)
    held = "x" * MAX_caption_bytes
    assert fetcher(tmp_path / "b", CaptionChoice(), [{"txt": held.encode()}]).caption(0) == held


def test_a_broken_json_is_bad(tmp_path: Path) -> None:
    with pytest.raises(BadSample, match="corrupt JSON"):
        fetcher(tmp_path, CaptionChoice({"json.alt": 1}), [{"json": b"{"}]).caption(0)
