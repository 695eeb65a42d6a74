"""Shards as files: which ones a pattern means, reading byte ranges of them, writing one atomically."""

import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from braceexpand import braceexpand

from ldm.errors import UserError

Shards = str | Path | Sequence[str | Path]


def expand(shards: Shards) -> list[str]:
    """The sorted shard paths that a brace pattern, a folder (its *.tar files) or a list of both means.

    Raises UserError where nothing is named, a path does not exist or is named twice.
    """
    entries = [shards] if isinstance(shards, str | Path) else list(shards)
    if not entries:
        raise UserError("no shards given; name a folder, a pattern like data/{00000..00127}.tar, or a list")
    paths = [path for entry in entries for path in _expand_entry(str(entry))]
    missing = [path for path in paths if not os.path.isfile(path)]
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
    """The paths of one entry; a folder gives its tar files."""
    if "://" in entry:
        raise UserError(f"remote shards are not read yet, got {entry}; copy them to a local folder")
    if not os.path.isdir(entry):
        return list(braceexpand(entry))
    found = sorted(str(path) for path in Path(entry).glob("*.tar"))
    if not found:
        inside = sorted({path.parent.name for path in Path(entry).glob("*/*.tar")})
        hint = f"; its folders {', '.join(inside)} do: name one of them" if inside else ""
        raise UserError(f"the folder {entry} has no *.tar files{hint}")
    return found


class ShardFile:
    """One open shard: byte ranges of it, its size, its time of change.

    A read that jumps costs as much as `jump_bytes` that are read in order.
    """

    jump_bytes = 16 << 10

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        stat = os.fstat(self._fd)
        self.size = stat.st_size
        self.mtime_ns = stat.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends before."""
        return os.pread(self._fd, size, offset)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()


def open_shard(path: str) -> ShardFile:
    """The shard at a path, open for reading. The one place that knows what kind of path it is."""
    return ShardFile(path)


class OpenShards:
    """The shards of a list, opened when first read; at most `limit` stay open, the least recently used goes.

    It is the process's own: a copy sent to another process starts with none open.
    """

    def __init__(self, paths: Sequence[str], limit: int = 64) -> None:
        self.paths = paths
        self.limit = limit
        self._open: OrderedDict[int, ShardFile] = OrderedDict()

    def __getitem__(self, number: int) -> ShardFile:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = open_shard(self.paths[number])
            if len(self._open) > self.limit:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(number)
        return shard

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "limit": self.limit, "_open": OrderedDict()}


def write_shard(path: str | Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Writes (key, {extension: bytes}) samples as one tar file and returns how many there were.

    The same samples give the same bytes: no times, no owners, members in the order given. The file appears
    under its name only when it is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    count = 0
    try:
        with tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT) as tar:
            for key, parts in samples:
                for extension, data in parts.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                count += 1
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count
