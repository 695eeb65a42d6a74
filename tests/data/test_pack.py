import fcntl
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from ldm.data.loading.fetch import Fetcher, View
from ldm.data.shards import pack as packing_module
from ldm.data.shards.index import load_manifest
from ldm.data.shards.index import main as index_main
from ldm.data.shards.pack import in_val, main, pack
from ldm.data.shards.packing import Packing
from ldm.data.shards.shards import expand
from ldm.errors import UserError
from tests.data.make import picture


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(25):
        (folder / f"p{i:02d}.png").write_bytes(picture(i, (20, 30)))
        (folder / f"p{i:02d}.txt").write_text(f"words {i}")
    return folder


def encode(data: bytes, packing: Packing) -> tuple[bytes, str, tuple[int, int]]:
    stored, kind, facts = packing.encode(data)
    return stored, kind, (facts["width"], facts["height"])


def read(folder: Path) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset(expand(folder), shardshuffle=False))


def test_a_sample_is_picture_text_and_json(source: Path, tmp_path: Path) -> None:
    (source / "p03.json").write_text('{"punsafe": 0.2, "width": 1}')
    done = pack(source, tmp_path / "out", Packing(shard_samples=10))
    assert done.samples == {"train": 25} and done.shards == 3
    entries = read(tmp_path / "out")
    assert [entry["__key__"] for entry in entries] == [f"p{i:02d}" for i in range(25)]
    untouched = (source / "p03.png").read_bytes()
    assert entries[3]["png"] == untouched and entries[3]["txt"] == b"words 3"
    digest = hashlib.sha256(untouched).hexdigest()
    facts = {"caption": "words 3", "width": 20, "height": 30, "sha256": digest, "punsafe": 0.2}
    assert json.loads(entries[3]["json"]) == facts


def test_packed_shards_are_indexed_and_fetched(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out", Packing(shard_samples=10))
    assert index_main([str(tmp_path / "out")]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert set(manifest.width.tolist()) == {20} and Fetcher(manifest, View.of(8))(24).caption == "words 24"


def test_the_same_source_gives_the_same_bytes_with_any_workers(source: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 2)):
        pack(source, tmp_path / name, Packing(size=16, format="webp", shard_samples=10), workers=workers)
    for number in range(3):
        one, two = (tmp_path / name / f"{number:05d}.tar" for name in ("a", "b"))
        assert one.read_bytes() == two.read_bytes()


def test_validation_is_a_share_by_key(source: Path, tmp_path: Path) -> None:
    done = pack(source, tmp_path / "out", Packing(val_fraction=0.3, shard_samples=10))
    train, val = ({e["__key__"] for e in read(tmp_path / "out" / split)} for split in ("train", "val"))
    assert len(train) == done.samples["train"] and len(val) == done.samples["val"] > 0
    assert len(train | val) == 25 and val == {key for key in train | val if in_val(key, 0.3)}
    share = np.mean([in_val(f"key{i}", 0.03) for i in range(20000)])
    assert abs(share - 0.03) < 0.005


def test_a_stopped_packing_goes_on_with_its_finished_shards_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(source, tmp_path / "whole", Packing(shard_samples=10))
    written: list[str] = []
    real = packing_module._write

    def failing(shard: Any, packing: Packing) -> Any:
        written.append(shard.path.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        return real(shard, packing)

    monkeypatch.setattr(packing_module, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", Packing(shard_samples=10))
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00000.tar"]
    done = pack(source, tmp_path / "out", Packing(shard_samples=10))
    assert done.kept_shards == 1 and written[2:] == ["00001.tar", "00002.tar"]
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_killed_packing_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for i in range(25, 200):
        (source / f"p{i:03d}.png").write_bytes(picture(i, (96, 96)))
        (source / f"p{i:03d}.txt").write_text(f"words {i}")
    packing = Packing(size=64, format="webp", shard_samples=10)
    out = tmp_path / "out"
    options = ["--size", "64", "--format", "webp", "--shard-samples", "10", "--workers", "2"]
    command = [sys.executable, "-m", "ldm.data.pack", str(source), str(out), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("*.tar"))) < 2:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    while _locked(out):  # its workers end with it
        time.sleep(0.01)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / ".00019.tar.1234abcd.tmp").write_bytes(b"left by a killed process")
    done = pack(source, out, packing)
    assert 2 <= done.kept_shards < done.shards == 20
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert list(out.glob(".*.tmp")) == []
    pack(source, tmp_path / "whole", packing)
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def _locked(out: Path) -> bool:
    """Whether a process still packs into the folder."""
    with (out / "pack.json").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_two_packings_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out")
    with (tmp_path / "out" / "pack.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is packing"):
            pack(source, tmp_path / "out")


def test_shards_are_bounded_in_bytes(source: Path, tmp_path: Path) -> None:
    (source / "p07.png").write_bytes(picture(7, (200, 200)))
    done = pack(source, tmp_path / "out", Packing(shard_bytes=30_000))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    large = [size for size in sizes if size > 30_000]
    assert len(large) == 1 and large[0] > 120_000  # one picture is larger than a shard may be
    assert done.shards == len(sizes) and 4 <= done.shards <= 8
    assert [entry["__key__"] for entry in read(tmp_path / "out")] == [f"p{i:02d}" for i in range(25)]
    both = pack(source, tmp_path / "both", Packing(shard_bytes=30_000, shard_samples=2))
    assert both.shards == 14  # 13 pairs, the large picture alone


def test_orientation_is_kept_or_applied() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    stored = BytesIO()
    upright = Image.open(BytesIO(picture(0, (20, 30))))
    upright.transpose(Image.Transpose.ROTATE_90).save(stored, "JPEG", quality=100, subsampling=0, exif=turned)
    data, kind, size = encode(stored.getvalue(), Packing())
    assert (data, kind, size) == (stored.getvalue(), "jpg", (20, 30))
    data, _, size = encode(stored.getvalue(), Packing(format="png"))
    again = Image.open(BytesIO(data))
    assert size == again.size == (20, 30)
    assert np.abs(np.asarray(again, np.float32) - np.asarray(upright, np.float32)).mean() < 12


def test_a_folder_with_another_packing_is_refused(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out", Packing(shard_samples=10))
    with pytest.raises(UserError, match="another packing"):
        pack(source, tmp_path / "out", Packing(shard_samples=11))
    (source / "p00.txt").write_text("other words")
    with pytest.raises(UserError, match="another packing"):
        pack(source, tmp_path / "out", Packing(shard_samples=10))
    (tmp_path / "out" / "pack.json").unlink()
    with pytest.raises(UserError, match="holds shards already"):
        pack(source, tmp_path / "out")


def test_a_bound_reduces_larger_pictures_only() -> None:
    data, kind, size = encode(picture(0, (20, 30)), Packing(size=10))
    assert (kind, size) == ("png", (10, 15)) and Image.open(BytesIO(data)).size == (10, 15)
    small = picture(0, (20, 30))
    assert encode(small, Packing(size=20)) == (small, "png", (20, 30))


def test_a_background_lies_under_transparency_only() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    stored = BytesIO()
    clear.save(stored, "WEBP", lossless=True)
    data, kind, _ = encode(stored.getvalue(), Packing(background="#00ff00"))
    assert kind == "webp" and np.asarray(Image.open(BytesIO(data))).reshape(-1, 3).tolist() == [[0, 255, 0]] * 64
    opaque = picture(1)
    assert encode(opaque, Packing(background="white"))[0] == opaque


@pytest.mark.parametrize("form", ["png", "webp"])
def test_lossless_formats_keep_the_pixels(form: str) -> None:
    data, kind, _ = encode(picture(2), Packing(format=form))
    assert kind == form
    assert (np.asarray(Image.open(BytesIO(data))) == np.asarray(Image.open(BytesIO(picture(2))))).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_every_kind_of_picture_can_be_stored(mode: str, form: str) -> None:
    stored = BytesIO()
    Image.open(BytesIO(picture(3))).convert("RGBA").convert(mode if mode != "CMYK" else "RGB").convert(mode).save(
        stored, "JPEG" if mode == "CMYK" else "PNG"
    )
    data, kind, size = encode(stored.getvalue(), Packing(size=8, format=form, background="white"))
    assert kind == form and size == (8, 8) and Image.open(BytesIO(data)).size == (8, 8)


def test_the_command_tells_counts_and_broken_pictures(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "alone.png").write_bytes(picture(0))
    assert main([str(source), str(tmp_path / "a"), "--val-fraction", "0.3"]) == 0
    told = capsys.readouterr().out
    assert "samples, val" in told and "left out: without caption" in told
    (source / "p05.png").write_bytes(picture(5)[:-50])
    assert main([str(source), str(tmp_path / "b"), "--workers", "1"]) == 1
    captured = capsys.readouterr()
    assert "p05.png: image file is truncated" in captured.err and "left out: broken" in captured.out
    assert len(read(tmp_path / "b")) == 24


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--format", "gif"], "format must be one of jpg, png, webp, got gif"),
        (["--background", "nocolour"], "nocolour is not a colour"),
        (["--val-fraction", "1"], r"val-fraction must be in \[0, 1\)"),
        (["--shard-samples", "0"], "must be at least 1"),
        (["--size", "0"], "size must be at least 1, got 0"),
        (["--shard-bytes", "0"], "shard-bytes must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert main([str(source), str(tmp_path / "out"), *options]) == 1
    captured = capsys.readouterr()
    assert re.search(told, captured.err)
    assert not (tmp_path / "out").exists()


def test_a_source_without_captions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture(0))
    with pytest.raises(UserError, match="1 without caption"):
        pack(tmp_path, tmp_path / "out")
