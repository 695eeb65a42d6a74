import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset

from ldm.data.shards.shards import OpenShards, expand, open_shard
from ldm.data.shards.write import write_shard
from ldm.errors import UserError
from tests.data.make import sample, shards


def test_pattern_folder_and_list_name_the_same_shards(tmp_path: Path) -> None:
    folder = shards(tmp_path, 30)
    paths = [f"{folder}/{number:05d}.tar" for number in range(3)]
    assert expand(folder) == paths
    assert expand(tmp_path) == paths
    assert expand(f"{folder}/{{00000..00002}}.tar") == paths
    assert expand([paths[2], f"{folder}/{{00000..00001}}.tar"]) == paths


@pytest.mark.parametrize("given", [[], "nowhere/{0..2}.tar", "nowhere.tar", "pipe:cat shards.tar"])
def test_shards_that_are_not_there_are_the_users_error(given: str | list[str]) -> None:
    with pytest.raises(UserError, match="shards"):
        expand(given)


def test_an_empty_folder_names_the_folders_that_have_shards(tmp_path: Path) -> None:
    shards(tmp_path / "train", 1)
    with pytest.raises(UserError, match=r"no \*\.tar files; its folders train do"):
        expand(tmp_path)


def test_a_shard_named_twice_is_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path, 1)
    with pytest.raises(UserError, match="more than once"):
        expand([folder, f"{folder}/00000.tar"])


def test_written_shards_are_read_by_webdataset(tmp_path: Path) -> None:
    folder = shards(tmp_path, 3)
    read = list(webdataset.WebDataset(expand(folder), shardshuffle=False))
    assert [entry["__key__"] for entry in read] == ["000000", "000001", "000002"]
    assert [{k: v for k, v in entry.items() if k[0] != "_"} for entry in read] == [sample(i)[1] for i in range(3)]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        assert write_shard(tmp_path / name, [sample(1), sample(2)]) == 2
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_shard_appears_only_when_complete(tmp_path: Path) -> None:
    def broken():
        yield sample(1)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_shard(tmp_path / "a.tar", broken())
    assert list(tmp_path.iterdir()) == []


def test_open_shards_keep_at_most_the_limit_and_travel_closed(tmp_path: Path) -> None:
    paths = expand(shards(tmp_path, 30))
    held = OpenShards(paths, limit=2)
    first = held[0]
    with tarfile.open(paths[0]) as tar:
        member = tar.getmembers()[1]
    assert first.read(member.offset_data, member.size) == b"picture 0"
    assert held[1].path == paths[1] and held[2].path == paths[2]
    with pytest.raises(OSError):  # it was closed
        first.read(0, 1)
    assert held[0].read(0, 6) == b"000000"
    assert pickle.loads(pickle.dumps(held))[2].path == paths[2]


def test_a_shard_read_past_its_end_gives_what_there_is(tmp_path: Path) -> None:
    shard = open_shard(expand(shards(tmp_path, 1))[0])
    assert shard.read(shard.size - 3, 100) == bytes(3)
