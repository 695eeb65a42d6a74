"""Damaged shards: each finding is exact, no incomplete sample is listed, memory stays bounded."""

import io
import json
import os
import struct
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from ldm.data.loading.fetch import Fetcher, View
from ldm.data.shards import tar as tar_module
from ldm.data.shards.index import index_shards, load_manifest, main
from ldm.data.shards.picture import BadSample
from ldm.data.shards.tar import PROBLEMS, scan_shard
from ldm.data.shards.write import write_shard
from ldm.errors import UserError
from tests.data.make import picture, sample, shards

COUNT = 12


def problems(path: Path) -> dict[str, int]:
    found = scan_shard(str(path)).problems
    assert set(found) == set(PROBLEMS)
    return {kind: count for kind, count in found.items() if count}


def gigapixel() -> bytes:
    data = bytearray(picture(0))
    data[16:24] = struct.pack(">II", 40_000, 25_000)
    return bytes(data)


@pytest.mark.parametrize("eighth", range(8))
def test_a_cut_shard_gives_its_whole_samples(tmp_path: Path, eighth: int) -> None:
    """Cut within each of: header, picture, its padding, text header, text, JSON, the next header, the end.

    A sample is whole once something else follows it.
    """
    path = Path(shards(tmp_path, COUNT, per_shard=COUNT)) / "00000.tar"
    with tarfile.open(path) as tar:
        member = {one.name: one for one in tar}
    first, text, facts = (member[f"000005.{kind}"] for kind in ("png", "txt", "json"))
    cuts = [
        (first.offset + 100, 4),
        (first.offset_data + 100, 4),
        (first.offset_data + first.size + 1, 5),
        (text.offset + 511, 5),
        (text.offset_data + 3, 5),
        (facts.offset_data + 3, 5),
        (member["000006.png"].offset + 1, 5),
        (-(-(member["000011.json"].offset_data + 60) // 512) * 512, 11),
    ]
    length, whole = cuts[eighth]
    path.write_bytes(path.read_bytes()[:length])
    scan = scan_shard(str(path))
    listed = [key.decode() for key in scan.keys]
    assert problems(path) == {"truncated": 1}
    assert listed == [f"{i:06d}" for i in range(whole)]
    fetcher = Fetcher(load_manifest(path, allow_damaged=True), View.of(8))
    assert [fetcher(i).caption for i in range(len(listed))] == [f"picture {i}" for i in range(len(listed))]
    with pytest.raises(UserError, match=r"00000\.tar: truncated"):
        load_manifest(path)


def test_an_interleaved_shard_gives_none_of_its_torn_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    (a, one), (b, two) = sample(1), sample(2)
    torn = [(a, {"png": one["png"]}), (b, {"txt": b"x"}), (a, {"txt": b"x"}), (b, {"png": two["png"]})]
    write_shard(path, [sample(0), *torn, sample(3)])
    assert problems(path) == {"interleaved": 2} and scan_shard(str(path)).keys == [b"000000", b"000003"]


def test_findings_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tar_module, "MAX_bytes", 50_000)
    bad = {
        "zero": {"png": b"", "txt": b"x"},
        "garbage": {"jpg": b"no picture", "txt": b"x"},
        "giga": {"png": gigapixel(), "txt": b"x"},
        "giga_json": {"png": gigapixel(), "json": b'{"caption": "x", "width": 40000, "height": 25000}'},
        "large": {"png": picture(0) + bytes(50_000), "txt": b"x"},
        "long": {"png": picture(0), "txt": b"x" * ((1 << 20) + 1)},
        "long_json": {"png": picture(0), "txt": b"x", "json": b'{"a": "' + bytes(1 << 20) + b'"}'},
        "just": {"png": picture(0), "txt": b"x" * (1 << 20)},
        "silent": {"png": picture(0), "txt": b""},
        "blind": {"txt": b"x"},
        "lying": {"png": picture(0), "txt": b"x", "json": b'{"width": 1000000, "height": "1000000"}'},
    }
    path = tmp_path / "a.tar"
    write_shard(path, [*bad.items(), sample(0)])
    expected = {"oversized": 3, "gigapixel": 2, "unreadable picture": 2, "no picture": 1, "no caption": 1}
    assert problems(path) == expected
    manifest = index_shards(path)
    assert [manifest.key(i) for i in range(len(manifest))] == ["zero", "garbage", "just", "silent", "lying", "000000"]
    assert manifest.width.tolist() == [0, 0, 16, 16, 16, 16]
    assert main([str(path)]) == 1
    told = capsys.readouterr().out
    assert all(f"{kind:<20}{count:>12}" in told for kind, count in expected.items())
    assert "a.tar: gigapixel: giga.png has 40000 x 25000 pixels" in told
    fetcher = Fetcher(load_manifest(path), View.of(8))  # nothing of this makes a shard damaged
    for index, reason in ((0, "empty picture"), (1, "corrupt picture")):
        with pytest.raises(BadSample, match=reason):
            fetcher(index)


def test_a_corrupt_jpeg_is_listed_and_bad_when_it_is_decoded(tmp_path: Path) -> None:
    data = picture(0, (64, 64), "JPEG")
    write_shard(tmp_path / "a.tar", [("cut", {"jpg": data[: len(data) // 2], "txt": b"x"}), sample(0)])
    manifest = load_manifest(tmp_path)
    assert len(manifest) == 2 and manifest.width.tolist() == [64, 16]
    with pytest.raises(BadSample, match="corrupt picture"):
        Fetcher(manifest, View.of(8))(0)


def test_memory_is_bounded_by_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        for name in ("a.json", "a.jpg", "b.jpg", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 80 << 20
            file.write(member.tobuf())
            file.seek(member.size, os.SEEK_CUR)  # a hole, which reads as zeros
        file.write(bytes(1024))
    tracemalloc.start()
    assert problems(path) == {"oversized": 2}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20


def test_sparse_members_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    key, parts = sample(0)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        hole = tarfile.TarInfo("hole.png")
        hole.size = 512
        head = bytearray(hole.tobuf(tarfile.GNU_FORMAT))
        head[156:157] = b"S"
        head[482:483] = b"\1"  # one more block of the map follows
        head[148:156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 8 * 32)
        tar.fileobj.write(bytes(head) + bytes(512) + b"x" * 512)
        tar.offset = tar.fileobj.tell()
        paxed = tarfile.TarInfo("pax.png")
        paxed.size, paxed.pax_headers = 3, {"GNU.sparse.major": "1"}
        tar.fileobj.write(paxed.tobuf(tarfile.PAX_FORMAT) + b"abc" + bytes(509))
        tar.offset = tar.fileobj.tell()
        for extension, data in parts.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert scan_shard(str(path)).keys == [b"000000"] and problems(path) == {}


def test_a_manifest_that_no_longer_fits_is_told(tmp_path: Path) -> None:
    folder = shards(tmp_path, 5)
    fetcher = Fetcher(load_manifest(folder), View.of(8))
    shards(tmp_path, 6)
    with pytest.raises(UserError, match=r"00000.tar changed after it was indexed"):
        fetcher(0)


def test_unfinished_columns_never_become_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path, 12)
    real = tar_module.scan_shard

    def failing(path: str) -> object:
        if path.endswith("1.tar"):
            raise UserError("the deadline")
        return real(path)

    monkeypatch.setattr("ldm.data.shards.index.scan_shard", failing)
    with pytest.raises(UserError, match="the deadline"):
        index_shards(folder)
    assert list((tmp_path / ".index").iterdir()) == []


def test_json_that_is_no_json_is_no_reason_to_stop(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    rows = [(f"{i}", {"png": picture(i), "txt": b"x", "json": data}) for i, data in enumerate((b"{", b"[1]", deep))]
    write_shard(tmp_path / "a.tar", [*rows, ("4", {"png": picture(4), "json": json.dumps({"caption": "x"}).encode()})])
    manifest = load_manifest(tmp_path)
    assert len(manifest) == 4 and manifest.width.tolist() == [16] * 4 and manifest.columns == ("width", "height")
