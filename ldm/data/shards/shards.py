"""Shards as files: which ones a pattern names, and reading byte ranges of them.

A path is local or a URL; `open_shard` alone knows which, everything else takes a Shard.
"""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from ldm.data.shards.remote import Remote, RemoteShard, Transient, file_system, is_remote, open_remote, retry
from ldm.data.shards.shard_cache import GiB, ShardCache
from ldm.errors import UserError

Shards = str | Path | Sequence[str | Path]
REQUESTS = 16  # to servers at once
TEMPORARY = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN})


def expand(shards: Shards) -> list[str]:
    """The sorted shard paths that a brace pattern, a folder (its *.tar files) or a list of both means.

    Raises UserError where nothing is named, a path does not exist or is named twice.
    """
    entries = [shards] if isinstance(shards, str | Path) else list(shards)
    if not entries:
        raise UserError("no shards named; name a folder, a pattern like data/{00000..00127}.tar, or a list")
    paths = [path for entry in entries for path in _expand_entry(str(entry))]
    missing = [path for path in paths if not is_remote(path) and not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} shards do not exist, the first is {missing[0]}; "
            "name a folder, a pattern such as data/{00000..00127}.tar, or a list"
        )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"the shard {twice} is named more than once; name each shard once")
    return sorted(paths)


def _expand_entry(entry: str) -> list[str]:
    """The paths of one entry; a folder gives its tar files, also one behind a URL whose files can be listed."""
    if entry.startswith("pipe:"):
        raise UserError(f"the shards of {entry} cannot be indexed; stream them (data=stream)")
    if is_remote(entry) and (entry.startswith("http") or ".tar" in entry):
        return list(braceexpand(entry))
    if is_remote(entry):
        return _list_folder(entry)
    if not os.path.isdir(entry):
        return list(braceexpand(entry))
    paths = sorted(str(path) for path in Path(entry).glob("*.tar"))
    if not paths:
        inside = sorted({path.parent.name for path in Path(entry).glob("*/*.tar")})
        hint = f"; its folders {', '.join(inside)} do: name one of them" if inside else ""
        raise UserError(f"the folder {entry} has no *.tar files{hint}")
    return paths


def _list_folder(url: str) -> list[str]:
    """The tar files of a remote folder."""
    files, path = file_system(url)
    try:
        names = sorted(files.glob(f"{path.rstrip('/')}/*.tar"))
    except Exception as error:  # each file system has its own
        raise UserError(f"the folder {url} cannot be listed: {type(error).__name__} {error}") from error
    if not names:
        raise UserError(f"the folder {url} has no *.tar files")
    return [str(files.unstrip_protocol(name)) for name in names]


def relative_names(paths: Sequence[str]) -> list[str]:
    """The shards' names below the folder that holds them all; the same for a copy in another place."""
    full = [path.partition("?")[0] if is_remote(path) else os.path.abspath(path) for path in paths]
    folders = [path.split("/")[:-1] for path in full]
    differ = (i for i, parts in enumerate(zip(*folders, strict=False)) if len(set(parts)) > 1)
    shared = next(differ, min(map(len, folders)))
    return ["/".join(path.split("/")[shared:]) for path in full]


def states(paths: Sequence[str], remote: Remote | None = None) -> list[tuple[int, int]]:
    """(size in bytes, time of change in ns) of each shard. Raises UserError for a remote one that is not there."""

    def state(path: str) -> tuple[int, int]:
        if is_remote(path):
            shard = open_remote(path, remote or Remote())
            return shard.size, shard.mtime_ns
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns

    if not any(map(is_remote, paths)):
        return [state(path) for path in paths]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(state, paths))


class ShardFile:
    """A local shard: byte ranges of it, its size in bytes, its time of change in ns.

    Temporary errors of network file systems are retried like those of a remote shard.
    """

    jump_bytes = 16 << 10  # read in order in the time of one jump

    def __init__(self, path: str, remote: Remote | None = None) -> None:
        self.path = path
        self.remote = remote or Remote()
        self._fd = os.open(path, os.O_RDONLY)
        stat = os.fstat(self._fd)
        self.size, self.mtime_ns = stat.st_size, stat.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends before."""
        try:
            return self._try(offset, size)
        except Transient:
            return retry(self.path, lambda _: self._try(offset, size), self.remote)

    def _try(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            if error.errno not in TEMPORARY:
                raise
            with suppress(OSError):  # a stale handle stays stale, so the file is opened again in its place
                fd = os.open(self.path, os.O_RDONLY)
                os.dup2(fd, self._fd)
                os.close(fd)
            raise Transient(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()


Shard = ShardFile | RemoteShard


@lru_cache(maxsize=1 << 17)  # the state of a shard with a local copy is requested once
def _state(url: str, remote: Remote) -> tuple[int, int]:
    shard = open_remote(url, remote)
    return shard.size, shard.mtime_ns


def open_shard(path: str, remote: Remote | None = None) -> Shard:
    """The shard at a path or URL, open for reading. The one place that knows what kind of path it is."""
    if not is_remote(path):
        return ShardFile(path, remote)
    remote = remote or Remote()
    if remote.shard_cache is None:
        return open_remote(path, remote)
    cache = ShardCache(remote.shard_cache, int(remote.shard_cache_gib * GiB))
    shard = open_remote(path, remote, _state(path, remote))
    while True:
        try:
            return ShardFile(cache.local(shard))
        except FileNotFoundError:  # removed for another process' shard before it was opened
            continue


class OpenShards(threading.local):
    """The shards of a list, opened when first read; at most `limit` stay open, the least recently used is closed.

    Local copies of remote shards stay open in a smaller number, since an open file keeps its place on the disk.
    Each thread and each process has its own. Where `states` are given, the (size, time of change) that each shard had
    when it was indexed, opening another file raises UserError.
    """

    def __init__(
        self,
        paths: Sequence[str],
        limit: int = 64,
        remote: Remote | None = None,
        states: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.paths = paths
        self.limit = limit if remote is None or remote.shard_cache is None else min(limit, 4)
        self.remote = remote
        self.states = states
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __getitem__(self, number: int) -> Shard:
        shard = self._open.get(number)
        if shard is None:
            shard = open_shard(self.paths[number], self.remote)
            if self.states is not None and (shard.size, shard.mtime_ns) != self.states[number]:
                raise UserError(f"{shard.path} changed after it was indexed; start again")
            self._open[number] = shard
            if len(self._open) > self.limit:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(number)
        return shard

    def __reduce__(self) -> tuple[type["OpenShards"], tuple[Any, ...]]:
        return OpenShards, (self.paths, self.limit, self.remote, self.states)
