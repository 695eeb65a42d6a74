import io
import json
import tarfile
from pathlib import Path

import pytest

from ldm.data.shards.members import members, split_name
from ldm.data.shards.shards import open_shard
from ldm.data.shards.tar import DAMAGE, JSON_CAPTION, NO_CAPTION, TEXT_CAPTION, scan_shard
from ldm.data.shards.write import write_shard

LONG = "folder/" * 30 + "name" * 20


def write(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> str:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def damage(path: str) -> dict[str, int]:
    return {kind: count for kind, count in scan_shard(path).problems.items() if count and kind in DAMAGE}


def triple(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", b"picture of " + key.encode()), (f"{key}.txt", b"caption")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["a", "some/folder/b", LONG[:180], "k\u00f6nig"])
def test_members_are_tarfiles(tmp_path: Path, form: int, key: str) -> None:
    if form == tarfile.USTAR_FORMAT:
        key = key[:90]
    path = write(tmp_path / "a.tar", [(f"{key}.jpg", bytes(513)), (f"{key}.txt", b""), ("z.txt", b"x" * 512)], form)
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert [tuple(member) for member in members(open_shard(path))] == expected


def test_a_pax_size_beyond_the_header_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.pax_headers, member.size = {"size": "5"}, 5
        tar.addfile(member, io.BytesIO(b"12345"))
        tar.addfile(tarfile.TarInfo("b.jpg"))
    assert [(m.name, m.size) for m in members(open_shard(str(path)))] == [("a.jpg", 5), ("b.jpg", 0)]


def test_names_split_as_in_webdataset() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ("a.jpg", "a.seg.png", "f.x/a.b.c", "f/a.JPG"):
        key, extension = base_plus_ext(name)
        assert split_name(name) == (key, extension.lower())
    for name in ("noextension", "f/.hidden", ".jpg", "__meta__.json"):
        assert split_name(name) is None


def test_a_folder_may_begin_with_the_key_before_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [*triple("a"), *triple("a.b/c"), ("a.b/c.d/e.jpg", b"x")])
    assert scan_shard(path).keys == [b"a", b"a.b/c", b"a.b/c.d/e"]


def test_offsets_point_at_the_parts(tmp_path: Path) -> None:
    described = json.dumps({"caption": "from json", "width": 30, "height": 20}).encode()
    path = write(tmp_path / "a.tar", [*triple("a"), ("a.json", described), ("b.webp", b"bb"), ("b.json", described)])
    scan = scan_shard(path)
    columns, data = scan.columns, Path(path).read_bytes()
    assert scan.keys == [b"a", b"b"]
    for part, expected in (("image", b"picture of a"), ("text", b"caption"), ("json", described)):
        start = int(columns[f"{part}_offset"][0])
        assert data[start : start + int(columns[f"{part}_size"][0])] == expected
    assert columns["text_size"].tolist() == [7, -1]
    assert columns["caption"].tolist() == [TEXT_CAPTION, JSON_CAPTION]
    assert columns["width"].tolist() == [30, 30] and columns["height"].tolist() == [20, 20]
    assert not any(scan.problems.values())


def test_samples_without_picture_or_caption_are_counted_not_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("a.txt", b"words"), ("b.png", b"x"), ("c.jpg", b"x"), ("c.txt", b"")])
    scan = scan_shard(path)
    assert scan.keys == [b"b", b"c"]
    assert scan.columns["caption"].tolist() == [NO_CAPTION, NO_CAPTION]
    assert scan.problems["no picture"] == 1 and scan.problems["no caption"] == 2
    assert damage(path) == {}


def test_interleaved_samples_are_found_and_left_out(tmp_path: Path) -> None:
    a, b = triple("a"), triple("b")
    path = write(tmp_path / "a.tar", [a[0], b[0], a[1], b[1], *triple("c")])
    assert damage(path) == {"interleaved": 2}
    assert scan_shard(path).keys == [b"c"]


@pytest.mark.parametrize("between", [[], triple("c")])
def test_duplicate_keys_are_found_and_left_out(tmp_path: Path, between: list[tuple[str, bytes]]) -> None:
    path = write(tmp_path / "a.tar", [*triple("a"), *between, *triple("a"), *triple("b")])
    assert damage(path) == {"duplicate": 1}
    assert b"a" not in scan_shard(path).keys and b"b" in scan_shard(path).keys


def test_every_cut_of_a_shard_is_found(tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    write_shard(whole, [("a", {"jpg": b"x" * 700, "txt": b"one"}), ("b", {"jpg": b"y" * 100, "txt": b"two"})])
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0"))
    cut = tmp_path / "cut.tar"
    for length in (0, 1, 511, 512, 600, 1535, 1536, 2048, end - 1, end, -(-end // 512) * 512):
        cut.write_bytes(data[:length])
        assert damage(str(cut)) == {"truncated": 1}, length
        assert set(scan_shard(str(cut)).keys) <= {b"a"}
    cut.write_bytes(data[: -(-end // 512) * 512 + 512])
    assert damage(str(cut)) == {}


def test_garbage_in_place_of_a_header_is_found(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.tar", [*triple("a"), *triple("b")]))
    data = bytearray(path.read_bytes())
    data[2048 + 10] ^= 1
    path.write_bytes(data)
    assert damage(str(path)) == {"truncated": 1}
    assert "byte 2048 is not a tar header" in scan_shard(str(path)).examples[0]
