"""Remote shards: the same bytes as local ones through every failure that passes by, a clear stop at others."""

import errno
import multiprocessing
import os
import pickle
from pathlib import Path

import fsspec
import pytest

from ldm.data.shards import remote as remote_module
from ldm.data.shards import shards as shards_module
from ldm.data.shards.index import index_shards, load_manifest, main
from ldm.data.shards.remote import Remote
from ldm.data.shards.shard_cache import GiB, ShardCache
from ldm.data.shards.shards import expand, open_shard
from ldm.data.shards.tar import scan_shard
from ldm.errors import UserError
from tests.data.make import shards
from tests.faults.server import FAULTS, serving

QUICK = Remote(deadline_s=20, timeout_s=0.5)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote_module, "FIRST_delay_s", 0.01)
    monkeypatch.setattr(remote_module, "LAST_delay_s", 0.02)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    shards_module._state.cache_clear()


def parts(path: str, remote: Remote | None = None) -> list[tuple[str, bytes, bytes]]:
    """Each sample of a shard: its key, picture and text."""
    scan, shard = scan_shard(path, remote), open_shard(path, remote)
    columns = [scan.columns[name].tolist() for name in ("image_offset", "image_size", "text_offset", "text_size")]
    rows = zip(scan.keys, *columns, strict=True)
    return [(key.decode(), shard.read(a, n), shard.read(b, m)) for key, a, n, b, m in rows]


@pytest.mark.parametrize("kind", FAULTS)
def test_what_passes_by_changes_neither_bytes_nor_order(tmp_path: Path, kind: str) -> None:
    folder = shards(tmp_path / "s", 12)
    expected = [parts(f"{folder}/0000{i}.tar") for i in range(2)]
    every_third = 3 if kind != "stall" else 5
    with serving(Path(folder), lambda number: kind if number % every_third == 0 else None) as served:
        paths = expand(f"{served.url}/{{00000..00001}}.tar")
        found = [parts(path, QUICK) for path in paths]
        manifest = index_shards(paths, remote=QUICK)
    assert found == expected and len(served.asked) > 8
    local = index_shards(folder)
    assert manifest.fingerprint == local.fingerprint
    assert manifest.image_offset.tolist() == local.image_offset.tolist()


@pytest.mark.parametrize("kind", FAULTS)
def test_what_does_not_pass_by_stops_at_the_deadline(tmp_path: Path, kind: str) -> None:
    shards(tmp_path, 2)
    words = {"reset": "Connection", "stall": "imed out", "short": "broke", "less": "instead of 10240"}
    told = words.get(kind, f"status {kind}")
    with serving(tmp_path, lambda number: kind if number >= 1 else None) as served:
        shard = open_shard(f"{served.url}/00000.tar", Remote(deadline_s=1, timeout_s=0.2))
        with pytest.raises(UserError, match=rf"00000.tar could not be read: .*{told}.* \(\d+ tries in .*deadline"):
            shard.read(0, 1000)
    assert len(served.asked) >= 3


@pytest.mark.parametrize("status", ["404", "403", "401", "410"])
def test_what_is_refused_stops_at_once(tmp_path: Path, status: str) -> None:
    shards(tmp_path, 2)
    with (
        serving(tmp_path, lambda number: status) as served,
        pytest.raises(UserError, match=f"00000.tar: status {status}"),
    ):
        open_shard(f"{served.url}/00000.tar", QUICK)
    assert len(served.asked) == 1


@pytest.mark.parametrize("kind", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_what_passes_by_on_local_disks_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    shard = open_shard(f"{shards(tmp_path, 2)}/00000.tar", Remote(deadline_s=0.5))
    expected, real, failures = shard.read(0, 600), os.pread, iter([True, True, False])

    def failing(*arguments: int) -> bytes:
        if next(failures, True):
            raise OSError(kind, os.strerror(kind))
        return real(*arguments)

    monkeypatch.setattr(os, "pread", failing)
    assert shard.read(0, 600) == expected
    with pytest.raises(UserError, match=r"00000.tar could not be read: .*tries in"):
        shard.read(0, 600)


def test_a_server_asks_for_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(remote_module.time, "sleep", waited.append)
    monkeypatch.setattr(remote_module, "FIRST_delay_s", 0.5)
    monkeypatch.setattr(remote_module, "LAST_delay_s", 30.0)
    asks = iter([0.0, 0.0, 7.0, 0.0])

    def attempt(left: float) -> str:
        for delay in asks:
            raise remote_module.Transient("busy", delay)
        return "done"

    assert remote_module.retry("url", attempt, Remote()) == "done"
    assert waited == [0.5, 1.0, 7.0, 4.0]


def test_the_deadline_counts_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(remote_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(remote_module.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
    monkeypatch.setattr(remote_module, "FIRST_delay_s", 0.5)
    monkeypatch.setattr(remote_module, "LAST_delay_s", 2.0)
    left: list[float] = []

    def attempt(seconds: float) -> None:
        left.append(seconds)
        raise remote_module.Transient("busy")

    with pytest.raises(UserError, match=r"u could not be read: busy \(7 tries in 10 s, the deadline is 10.5 s\)"):
        remote_module.retry("u", attempt, Remote(deadline_s=10.5))
    assert left == [10.5, 10.0, 9.0, 7.0, 5.0, 3.0, 1.0]


def test_a_server_without_ranges_is_refused(tmp_path: Path) -> None:
    shards(tmp_path, 2)
    with (
        serving(tmp_path, lambda number: "200") as served,
        pytest.raises(UserError, match="gives no ranges"),
    ):
        open_shard(f"{served.url}/00000.tar", QUICK)


def test_a_shard_that_changes_under_a_reader_is_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path, 2)
    with serving(tmp_path) as served:
        shard = open_shard(f"{served.url}/00000.tar", QUICK)
        shards(Path(folder), 9)
        with pytest.raises(UserError, match="changed after it was opened"):
            shard.read(0, 512)


def test_wide_gaps_are_jumped_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path, 40, per_shard=40, size=(200, 200))  # 120 KB each
    size = os.path.getsize(f"{folder}/00000.tar")
    with serving(tmp_path) as served:
        url = f"{served.url}/00000.tar"
        whole = scan_shard(url, QUICK)
        in_order = len(served.asked)
        served.asked.clear()
        monkeypatch.setattr(remote_module.RemoteShard, "jump_bytes", 32 << 10)
        monkeypatch.setattr(remote_module, "LEAST_bytes", 2 << 10)
        jumped = scan_shard(url, QUICK)
    assert whole.keys == jumped.keys and in_order < 15
    assert sum(last - first + 1 for _, first, last in served.asked) < size / 5


def test_training_asks_servers_for_the_state_of_shards_once(tmp_path: Path) -> None:
    shards(tmp_path / "s", 12)
    with serving(tmp_path / "s") as served:
        url = f"{served.url}/{{00000..00001}}.tar"
        made = index_shards(url, remote=QUICK)
        served.asked.clear()
        manifest = load_manifest(url, remote=QUICK)
        assert manifest.folder == made.folder and served.asked == []
        again = pickle.loads(pickle.dumps(manifest)).open_shards()
        start, size = int(manifest.text_offset[11]), int(manifest.text_size[11])
        assert again[1].read(start, size) == b"picture 11"


def test_fsspec_file_systems_are_read_and_listed(tmp_path: Path) -> None:
    folder = Path(shards(tmp_path, 12))
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe_file(f"/here/{path.name}", path.read_bytes())
    paths = expand("memory://here")
    assert paths == [f"memory:///here/0000{i}.tar" for i in range(2)]
    assert [parts(path, QUICK) for path in paths] == [parts(path) for path in expand(folder)]
    with pytest.raises(UserError, match="FileNotFoundError"):
        open_shard("memory://here/00009.tar", QUICK)
    with pytest.raises(UserError, match="nosuch"):
        open_shard("nosuch://here/00000.tar", QUICK)


def test_the_command_indexes_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards(tmp_path / "s", 12)
    with serving(tmp_path / "s") as served:
        assert main([f"{served.url}/{{00000..00001}}.tar"]) == 0
        told = capsys.readouterr().out.split()
        assert told[told.index("samples") + 1] == "12"
        assert main([f"{served.url}/{{00000..00002}}.tar"]) == 1
        assert "00002.tar: status 404" in capsys.readouterr().err


def cached(folder: Path, gib: float) -> Remote:
    return Remote(deadline_s=20, timeout_s=0.5, shard_cache=str(folder), shard_cache_gib=gib)


def test_a_cache_keeps_whole_shards_up_to_its_size(tmp_path: Path) -> None:
    folder = shards(tmp_path / "s", 50)
    one = os.path.getsize(f"{folder}/00000.tar")
    cache = tmp_path / "cache"
    with serving(Path(folder), lambda number: "short" if number % 4 == 1 else None) as served:
        remote = cached(cache, 2.5 * one / GiB)
        urls = [f"{served.url}/0000{i}.tar" for i in range(5)]
        for number in (0, 1, 0, 2):  # 1 was opened longest ago when 2 comes
            assert parts(urls[number], remote) == parts(f"{folder}/0000{number}.tar")
            assert sum(path.stat().st_size for path in cache.iterdir()) <= 2.5 * one
        served.asked.clear()
        open_shard(urls[0], remote), open_shard(urls[2], remote)
        assert served.asked == []
        open_shard(urls[1], remote)
        assert {path for path, _, _ in served.asked} == {"/00001.tar"}
        with pytest.raises(UserError, match="shard_cache_gib"):
            open_shard(urls[3], cached(cache, 0.5 * one / GiB))


def test_a_copy_of_a_shard_that_changed_is_fetched_anew(tmp_path: Path) -> None:
    folder = Path(shards(tmp_path / "s", 2))
    with serving(folder) as served:
        url, remote = f"{served.url}/00000.tar", cached(tmp_path / "cache", 1)
        open_shard(url, remote)
        shards(folder, 9)
        shards_module._state.cache_clear()
        assert parts(url, remote) == parts(f"{folder}/00000.tar") and len(parts(url, remote)) == 9


def test_an_abandoned_download_is_cleared_away(tmp_path: Path) -> None:
    folder = Path(shards(tmp_path / "s", 2))
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".dead.tar.part").write_bytes(bytes(1000))
    with serving(folder) as served:
        open_shard(f"{served.url}/00000.tar", cached(cache, 1))
    assert not (cache / ".dead.tar.part").exists()


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    folder = Path(shards(tmp_path / "s", 2))
    remote = Remote(deadline_s=0.2, timeout_s=0.1, shard_cache=str(tmp_path / "cache"))
    with (
        serving(folder, lambda number: "500" if number else None) as served,
        pytest.raises(UserError, match="could not be read"),
    ):
        open_shard(f"{served.url}/00000.tar", remote)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".room"]


def _read(url: str, remote: Remote, out: "multiprocessing.Queue[int]") -> None:
    out.put(len(parts(url, remote)))


def test_processes_share_one_download(tmp_path: Path) -> None:
    folder = Path(shards(tmp_path / "s", 10))
    context = multiprocessing.get_context("fork")
    out: multiprocessing.Queue[int] = context.Queue()
    with serving(folder) as served:
        url, remote = f"{served.url}/00000.tar", cached(tmp_path / "cache", 1)
        readers = [context.Process(target=_read, args=(url, remote, out)) for _ in range(4)]
        for reader in readers:
            reader.start()
        assert [out.get(timeout=60) for _ in readers] == [10] * 4
        for reader in readers:
            reader.join()
    loads = [last for _, first, last in served.asked if first == 0 and last > 0]
    assert len(loads) == 4 + 1  # each scans by ranges once, one of them loads the shard
    assert ShardCache(tmp_path / "cache", GiB)._place(url).is_file()


def test_the_shipped_config_has_the_knobs() -> None:
    from ldm.config.build import build
    from ldm.config.check import check
    from ldm.config.compose import compose

    overrides = ["data.train.shards=s", "data.val.shards=v", "run_folder=x", "name=x", "trainer.max_steps=3"]
    data = compose("train", [*overrides, "data.train.remote.shard_cache=c"]).data
    check(data)
    built = build(data)
    assert built.sources["train"].remote == built.val.remote == Remote(shard_cache="c")
    assert build(compose("train", overrides).data).sources["train"].remote == Remote()


@pytest.mark.parametrize("knob", ["deadline_s", "timeout_s", "shard_cache_gib"])
def test_knobs_are_above_zero(knob: str) -> None:
    with pytest.raises(UserError, match=f"{knob} must be above 0, got 0"):
        Remote(**{knob: 0})


def test_a_sample_of_a_shard_that_changed_on_its_server_is_refused(tmp_path: Path) -> None:
    from ldm.data.loading.fetch import Fetcher, View

    folder = Path(shards(tmp_path / "s", 5))
    with serving(folder) as served:
        url = f"{served.url}/00000.tar"
        assert Fetcher(load_manifest(url, remote=QUICK), View.of(8))(4).caption == "picture 4"
        shards(folder, 6)
        fetcher = Fetcher(load_manifest(url, remote=QUICK), View.of(8))
        with pytest.raises(UserError, match=r"00000.tar changed after it was indexed"):
            fetcher(0)
        assert len(index_shards(url, remote=QUICK)) == 6


def test_what_passes_by_is_no_bad_sample(tmp_path: Path) -> None:
    from ldm.data.loading.fetch import Fetcher, View

    folder = Path(shards(tmp_path / "s", 5))
    with serving(folder) as served:
        manifest = load_manifest(f"{served.url}/00000.tar", remote=Remote(deadline_s=0.3, timeout_s=0.2))
    with pytest.raises(UserError, match="could not be read"):  # the server is gone
        Fetcher(manifest, View.of(8)).fetch_or_substitute(0)
