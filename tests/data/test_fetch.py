import json
import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.loading import fetch
from ldm.data.loading.caption_choice import CaptionChoice
from ldm.data.loading.fetch import Fetcher, View
from ldm.data.shards.index import load_manifest
from ldm.data.shards.picture import BadSample
from ldm.data.shards.write import write_shard
from ldm.errors import UserError
from tests.data.make import picture, sample, shards


def one(tmp_path: Path, parts: dict[str, bytes], view: View | None = None, **options: object) -> Fetcher:
    write_shard(tmp_path / "a.tar", [("key", parts)])
    return Fetcher(load_manifest(tmp_path), view or View.of(16), **options)  # type: ignore[arg-type]


def test_a_picture_of_the_wanted_size_is_not_resampled(tmp_path: Path) -> None:
    fetcher = Fetcher(load_manifest(shards(tmp_path, 3)), View.of(16))
    expected = np.asarray(Image.open(BytesIO(picture(1))))
    found = fetcher(1)
    assert (found.pixels == expected).all()
    assert found.caption == "picture 1" and found.original_size == (16, 16) and found.crop == (0, 0)
    assert found.image.shape == (3, 16, 16) and found.image.dtype == torch.float32
    assert torch.equal(found.image[0], torch.from_numpy(expected[..., 0].astype(np.float32)) / 127.5 - 1)


def test_images_reach_both_ends() -> None:
    pixels = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3)
    assert fetch.as_images(pixels).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])


def test_crops_are_central_or_drawn_from_the_address(tmp_path: Path) -> None:
    manifest = load_manifest(shards(tmp_path, 40, size=(16, 48)))
    assert Fetcher(manifest, View.of(16))(3).crop == (16, 0)
    random = Fetcher(manifest, View.of(16, random_crop=True), seed=5)
    crops = [random(i).crop[0] for i in range(40)]
    assert min(crops) < 8 and max(crops) > 24 and max(crops) <= 32
    assert crops == [Fetcher(manifest, View.of(16, random_crop=True), seed=5)(i).crop[0] for i in range(40)]
    assert crops != [random(i, epoch=1).crop[0] for i in range(40)]
    whole = np.asarray(Image.open(BytesIO(picture(7, (16, 48)))))
    assert (random(7).pixels == whole[crops[7] : crops[7] + 16]).all()


def test_flips_are_drawn_for_half(tmp_path: Path) -> None:
    manifest = load_manifest(shards(tmp_path, 60))
    plain, flipping = Fetcher(manifest, View.of(16)), Fetcher(manifest, View.of(16, flip=True))
    flips = [not (plain(i).pixels == flipping(i).pixels).all() for i in range(60)]
    assert 15 < sum(flips) < 45
    turned = flips.index(True)
    assert (flipping(turned).pixels == plain(turned).pixels[:, ::-1]).all()


def test_captions_come_from_the_text_else_the_json(tmp_path: Path) -> None:
    described = json.dumps({"caption": " from json "}).encode()
    parts = {"png": picture(0), "json": described}
    assert one(tmp_path / "a", parts)(0).caption == "from json"
    assert one(tmp_path / "b", parts | {"txt": b" from text\n"})(0).caption == "from text"
    with pytest.raises(BadSample, match="no caption"):
        one(tmp_path / "c", {"png": picture(0)})(0)
    assert one(tmp_path / "d", {"png": picture(0)}, captions=CaptionChoice(required=False))(0).caption == ""


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty picture"), (b"no picture", "corrupt picture"), (picture(0)[:-100], "corrupt picture")],
)
def test_broken_pictures_have_a_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        one(tmp_path, {"png": data, "txt": b"words"})(0)


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher = one(tmp_path, {"png": picture(0), "txt": b"words"})
    monkeypatch.setattr(fetch, "MAX_bytes", 100)
    with pytest.raises(BadSample, match="too many bytes"):
        fetcher(0)


def test_a_bad_sample_has_the_same_good_substitute_everywhere(tmp_path: Path) -> None:
    broken = [("broken", {"png": b"", "txt": b"words"})]
    write_shard(tmp_path / "a.tar", [*broken, *(sample(i) for i in range(20))])
    manifest = load_manifest(tmp_path)
    substitute, bad = Fetcher(manifest, View.of(16), seed=1).fetch_or_substitute(0, epoch=2)
    assert bad == [(0, "empty picture")] and substitute.index > 0
    assert Fetcher(manifest, View.of(16), seed=1).fetch_or_substitute(0, epoch=2)[0].index == substitute.index
    others = {Fetcher(manifest, View.of(16), seed=1).fetch_or_substitute(0, epoch)[0].index for epoch in range(9)}
    assert len(others) > 3
    assert Fetcher(manifest, View.of(16)).fetch_or_substitute(5)[1] == []


def test_nothing_but_bad_samples_ends_with_their_names(tmp_path: Path) -> None:
    fetcher = one(tmp_path, {"png": b"", "txt": b"words"})
    with pytest.raises(UserError, match=r"(?s)8 samples in a row.*key in .*a.tar: empty picture"):
        fetcher.fetch_or_substitute(0)


def test_a_cache_changes_nothing_and_keeps_its_bound(tmp_path: Path) -> None:
    manifest = load_manifest(shards(tmp_path, 10, size=(16, 32)))
    view = View.of(16, random_crop=True, flip=True)
    plain, cached = Fetcher(manifest, view), Fetcher(manifest, view, cache_bytes=5 * 16 * 32 * 3)
    for epoch in range(3):
        for i in range(10):
            assert (plain(i, epoch).pixels == cached(i, epoch).pixels).all()
    assert len(cached._cache.pictures) == 5 and not plain._cache.pictures
    sent = pickle.loads(pickle.dumps(cached))
    assert not sent._cache.pictures and (sent(3).pixels == plain(3).pixels).all()


def test_a_shard_that_changed_after_indexing_is_refused(tmp_path: Path) -> None:
    manifest = load_manifest(shards(tmp_path, 3))
    write_shard(tmp_path / "00000.tar", [sample(9)])
    with pytest.raises(UserError, match="changed after it was indexed"):
        Fetcher(manifest, View.of(16))(0)


@pytest.mark.parametrize("size", [0, [3], [4, 5, 6], [4, 0], [4.0, 5]])
def test_sizes_that_are_none_are_refused(size: int | list[int]) -> None:
    with pytest.raises(UserError, match="size must be"):
        View.of(size)
