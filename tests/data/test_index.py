import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ldm.data.shards import columns, index
from ldm.data.shards.index import index_shards, load_manifest, main
from ldm.data.shards.write import write_shard
from ldm.errors import UserError
from tests.data.make import picture, sample, shards


def cut(path: str) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) - 10240])


def test_the_manifest_finds_every_sample(tmp_path: Path) -> None:
    manifest = load_manifest(shards(tmp_path, 25, size=(18, 16)))
    assert len(manifest) == 25
    assert [manifest.key(i) for i in range(25)] == [f"{i:06d}" for i in range(25)]
    assert manifest.shard.tolist() == [0] * 10 + [1] * 10 + [2] * 5
    assert manifest.shard_of(24) == str(tmp_path / "00002.tar")
    assert set(manifest.width.tolist()) == {18} and set(manifest.height.tolist()) == {16}
    for i in (0, 17, 24):
        data = Path(manifest.shard_of(i)).read_bytes()
        start = int(manifest.image_offset[i])
        assert data[start : start + int(manifest.image_size[i])] == sample(i, (18, 16))[1]["png"]


def described(folder: Path, rows: list[dict[str, object]], per_shard: int = 3) -> str:
    """Shards whose samples have these JSON parts."""
    for number, start in enumerate(range(0, len(rows), per_shard)):
        held = range(start, min(start + per_shard, len(rows)))
        parts = ((f"{i}", {"png": picture(i), "txt": b"x", "json": json.dumps(rows[i]).encode()}) for i in held)
        write_shard(folder / f"{number:05d}.tar", parts)
    return str(folder)


def test_numbers_of_the_json_are_columns(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"score": i / 10, "width": 64, "height": "48"} for i in range(3)]
    rows += [{"late/name": str(i), "ok": i % 2 == 0} for i in range(3, 8)]
    manifest = load_manifest(described(tmp_path, rows))
    assert manifest.columns == ("width", "height", "score", "ok", "late/name")
    nan = np.nan
    np.testing.assert_array_equal(manifest.column("score"), [0, 0.1, 0.2, *[nan] * 5])
    np.testing.assert_array_equal(manifest.column("late/name"), [*[nan] * 3, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(manifest.column("ok"), [*[nan] * 3, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(manifest.column("width"), [64] * 3 + [16] * 5)  # else the picture's own
    np.testing.assert_array_equal(manifest.column("height"), [48] * 3 + [16] * 5)
    assert all(manifest.column(name).dtype == np.float64 for name in manifest.columns)
    assert all(isinstance(manifest.column(name).base, np.memmap) for name in manifest.columns)


def test_a_size_that_is_not_known_is_nan(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("a", {"jpg": b"no picture", "txt": b"x"}), sample(1)])
    np.testing.assert_array_equal(load_manifest(tmp_path).column("width"), [np.nan, 16])


def test_an_unknown_column_names_the_nearest(tmp_path: Path) -> None:
    manifest = load_manifest(described(tmp_path, [{"AESTHETIC_SCORE": 5.0}]))
    with pytest.raises(UserError, match=r"no numeric column AESTETIC_SCORE; did you mean AESTHETIC_SCORE\?"):
        manifest.column("AESTETIC_SCORE")


def test_columns_beyond_the_limit_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MAX_columns", 4)
    manifest = load_manifest(described(tmp_path, [{"a": 1, "b": 2}, {"c": 3}, {"c": 4}, {"d": 5}]))
    assert manifest.columns == ("width", "height", "a", "b")
    assert json.loads((manifest.folder / "manifest.json").read_text())["columns_left_out"] == ["c", "d"]


def test_a_manifest_of_another_version_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path, 5)
    monkeypatch.setattr(index, "VERSION", index.VERSION - 1)
    before = index_shards(folder).folder
    monkeypatch.undo()
    after = index_shards(folder)
    assert after.folder != before and not before.exists() and after.columns == ("width", "height")


def test_two_lists_in_one_folder_keep_their_manifests(tmp_path: Path) -> None:
    one, two = (index_shards(shards(tmp_path / name, 5), tmp_path / "kept") for name in ("a", "b"))
    assert one.folder != two.folder and one.folder.is_dir() and two.folder.is_dir()


def test_columns_are_memory_mapped_and_travel_as_a_path(tmp_path: Path) -> None:
    manifest = load_manifest(shards(tmp_path, 5))
    assert isinstance(manifest.image_offset.base, np.memmap)
    sent = pickle.dumps(manifest)
    assert len(sent) < 500
    assert pickle.loads(sent).key(4) == "000004"


def test_it_is_used_again_until_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path, 20)
    first = index_shards(folder)
    scanned: list[str] = []
    scan = index.scan_shard
    monkeypatch.setattr(index, "scan_shard", lambda path: scanned.append(path) or scan(path))
    assert index_shards(folder).folder == first.folder and scanned == []
    write_shard(tmp_path / "00001.tar", [sample(77)])
    again = index_shards(folder)
    assert len(again) == 11 and again.key(10) == "000077" and len(scanned) == 2
    assert again.fingerprint != first.fingerprint
    assert [path.name for path in (tmp_path / ".index").iterdir()] == [again.folder.name]
    os.utime(tmp_path / "00000.tar", (1, 1))
    assert index_shards(folder).fingerprint == again.fingerprint and len(scanned) == 4


def test_parts_of_a_folder_have_manifests_of_their_own(tmp_path: Path) -> None:
    folder = shards(tmp_path, 20)
    one, two = index_shards(f"{folder}/00000.tar"), index_shards(f"{folder}/00001.tar")
    assert len(index_shards(folder)) == 20
    assert one.folder.is_dir() and two.folder.is_dir() and one.fingerprint != two.fingerprint


def test_the_fingerprint_is_the_contents_not_the_place(tmp_path: Path) -> None:
    prints = [index_shards(shards(tmp_path / name, 12)).fingerprint for name in ("a", "b")]
    assert prints[0] == prints[1]
    assert index_shards(shards(tmp_path / "c", 13)).fingerprint != prints[0]


def test_processes_that_index_at_once_agree(tmp_path: Path) -> None:
    folder = shards(tmp_path, 20)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: index_shards(folder), range(8)))
    assert {manifest.key(19) for manifest in made} == {"000019"}
    assert [path.name for path in (tmp_path / ".index").iterdir()] == [made[0].folder.name]


def test_many_bytes_are_read_by_processes_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path, 30)
    alone = index_shards(folder, tmp_path / "one")
    monkeypatch.setattr(index, "POOL_bytes", 0)
    assert index_shards(folder, tmp_path / "two").fingerprint == alone.fingerprint


def test_damage_is_refused_with_the_shard_and_what_to_do(tmp_path: Path) -> None:
    folder = shards(tmp_path, 30)
    cut(f"{folder}/00001.tar")
    with pytest.raises(UserError, match=r"(?s)1 of 3 shards are damaged:\n.*00001.tar: truncated.*allow_damaged"):
        load_manifest(folder)
    assert 20 <= len(load_manifest(folder, allow_damaged=True)) < 30


def test_no_samples_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="no samples in 1 shards"):
        load_manifest(tmp_path)


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another folder"):
        index_shards(shards(tmp_path, 1), tmp_path / "file" / "below")


def test_the_command_tells_counts_and_its_status_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards(tmp_path / "s", 20)
    assert main([folder]) == 0
    told = capsys.readouterr().out.split()
    assert told[:2] == ["shards", "2"] and told[told.index("samples") + 1] == "20"
    cut(f"{folder}/00000.tar")
    assert main([folder]) == 1
    assert "00000.tar: truncated" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing")]) == 1
    assert "do not exist" in capsys.readouterr().err
    write_shard(tmp_path / "e" / "a.tar", [])
    assert main([str(tmp_path / "e")]) == 1
