"""Shards into other shards, members as they are."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from ldm.data.shards.pack import main, pack
from ldm.data.shards.packing import Packing
from ldm.data.shards.shards import expand
from ldm.data.shards.write import write_shard
from ldm.errors import UserError
from tests.data.make import picture, sample, shards


def read(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    found = webdataset.WebDataset(expand(folder), shardshuffle=False)
    return [(one["__key__"], {k: v for k, v in one.items() if k[0] != "_"}) for one in found]


def test_members_order_and_keys_are_kept(tmp_path: Path) -> None:
    folder = Path(shards(tmp_path / "s", 25, per_shard=7))
    more = {"JPG": picture(1, kind="JPEG"), "cls": b"3", "json": b'{ "b": 1.0, "a":[1] }', "seg.png": picture(2)}
    write_shard(folder / "00009.tar", [("some/folder/odd", more)])
    done = pack(str(folder / "{00000..00003}.tar"), tmp_path / "out", Packing(shard_samples=10))
    assert read(tmp_path / "out") == [sample(i) for i in range(25)] and done.shards == 3 and done.renamed == 0
    pack(folder, tmp_path / "all", Packing(shard_bytes=20_000), workers=2)
    assert read(tmp_path / "all") == read(folder)
    assert all(path.stat().st_size <= 20_480 for path in (tmp_path / "all").glob("*.tar"))
    with tarfile.open(expand(tmp_path / "all")[-1]) as tar:
        assert "some/folder/odd.JPG" in tar.getnames()


def test_keys_of_several_shards_are_renamed_in_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / "s" / f"{name}.tar", [sample(1), sample(ord(name))])
    done = pack(tmp_path / "s", tmp_path / "out")
    keys = [key for key, _ in read(tmp_path / "out")]
    assert done.renamed == 2 and len(set(keys)) == 4
    assert [key.partition("_")[0] for key in keys] == ["000001", "000097", "000001", "000098"]
    assert [parts for _, parts in read(tmp_path / "out")] == [sample(i)[1] for i in (1, 97, 1, 98)]
    pack(tmp_path / "s", tmp_path / "again")
    assert [key for key, _ in read(tmp_path / "again")] == keys


def test_pictures_are_reduced_and_the_json_is_told(tmp_path: Path) -> None:
    facts = {"caption": "c", "width": 40, "height": 30, "punsafe": 0.5}
    parts = {"png": picture(0, (40, 30)), "json": json.dumps(facts).encode(), "npy": b"kept"}
    write_shard(tmp_path / "s" / "a.tar", [("x", parts), sample(1)])
    pack(tmp_path / "s", tmp_path / "out", Packing(size=15))
    (_, reduced), (_, small) = read(tmp_path / "out")
    told = json.loads(reduced["json"])
    assert (told["width"], told["height"], told["punsafe"]) == (20, 15, 0.5) and len(told["sha256"]) == 64
    assert reduced["npy"] == b"kept" and small["txt"] == b"picture 1"
    pack(tmp_path / "s", tmp_path / "same", Packing(size=64))
    assert read(tmp_path / "same") == [("x", parts), sample(1)]


def test_damaged_shards_are_refused_or_their_whole_samples_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shards(tmp_path / "s", 10))
    path = folder / "00000.tar"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"picture 6")])
    with pytest.raises(UserError, match=r"00000.tar is damaged: truncated.*--allow-damaged"):
        pack(folder, tmp_path / "out")
    assert main([str(folder), str(tmp_path / "out"), "--allow-damaged", "--workers", "1"]) == 0
    assert "left out: truncated" in capsys.readouterr().out
    assert read(tmp_path / "out") == [sample(i) for i in range(6)]


def test_broken_pictures_are_left_out_where_they_are_decoded(tmp_path: Path) -> None:
    write_shard(tmp_path / "s" / "a.tar", [("x", {"png": picture(0)[:-60], "txt": b"x"}), sample(1)])
    done = pack(tmp_path / "s", tmp_path / "out", Packing(size=8))
    assert [key for key, _ in read(tmp_path / "out")] == ["000001"] and len(done.broken) == 1


def img2dataset_shaped(path: Path, count: int) -> list[dict[str, Any]]:
    """A shard as img2dataset's files writer lays it out, with a table and statistics beside it."""
    facts = []
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            key = f"{i:09d}"
            facts.append(
                {
                    "caption": f"a picture {i}",
                    "url": f"https://example.org/{i}.jpg",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": 24,
                    "height": 16,
                    "original_width": 100 + i,
                    "original_height": 90,
                    "exif": "{}",
                    "sha256": "0" * 64,
                    "similarity": str(0.25 + i),
                    "NSFW": "UNLIKELY",
                    "AESTHETIC_SCORE": 5.5 if i % 2 else None,
                }
            )
            parts = {"jpg": picture(i, (24, 16), "JPEG"), "txt": f"a picture {i}".encode()}
            for extension, data in (parts | {"json": json.dumps(facts[-1], indent=4).encode()}).items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mtime, member.uname = len(data), 1.5e9, "bigdata"
                tar.addfile(member, io.BytesIO(data))
    path.with_suffix(".parquet").write_bytes(b"a table")
    path.with_name(f"{path.stem}_stats.json").write_text("{}")
    return facts


def test_what_img2dataset_writes_is_read(tmp_path: Path) -> None:
    import numpy as np

    from ldm.data.shards.index import load_manifest

    img2dataset_shaped(tmp_path / "00000.tar", 6)
    img2dataset_shaped(tmp_path / "00001.tar", 6)
    manifest = load_manifest(tmp_path)
    assert len(manifest) == 12 and manifest.key(6) == "000000000" and manifest.paths[0].endswith("00000.tar")
    columns = ("width", "height", "original_width", "original_height", "similarity", "AESTHETIC_SCORE")
    assert set(columns) <= set(manifest.columns) and {"NSFW", "key", "caption", "url"}.isdisjoint(manifest.columns)
    assert manifest.column("similarity")[6:].tolist() == [0.25 + i for i in range(6)]
    assert np.isnan(manifest.column("AESTHETIC_SCORE")[::2]).all()
    done = pack(tmp_path, tmp_path / "out", Packing(shard_samples=100))
    assert done.renamed == 12 and len(read(tmp_path / "out")) == 12


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    from ldm.data.shards.index import load_manifest

    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            key, parts = sample(i)
            writer.write({"__key__": key, **parts})
    manifest = load_manifest(tmp_path)
    assert [manifest.key(i) for i in range(10)] == [f"{i:06d}" for i in range(10)] and len(manifest.paths) == 3
    pack(tmp_path, tmp_path / "out", Packing(shard_samples=100))
    assert read(tmp_path / "out") == [sample(i) for i in range(10)]
