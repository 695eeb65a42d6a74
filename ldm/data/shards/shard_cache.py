"""A local folder of whole remote shards, of bounded size, that any number of processes share.

A shard is downloaded once: under `.NAME.part`, which its writer locks, and renamed when it is complete. The least
recently opened shard is removed first. A file's time of access is when it was opened last, its time of change is
the remote shard's stamp.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm.data.shards.remote import RemoteShard
from ldm.errors import UserError

PIECE_bytes = 16 << 20
GiB = 1 << 30
WAIT_s = 0.2


class ShardCache:
    """Whole shards in a folder, at most `limit_bytes` of them, those being downloaded included."""

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes

    def local(self, shard: RemoteShard) -> str:
        """The path of a local copy of the shard, downloaded where there is none. Raises UserError."""
        if shard.size > self.limit_bytes:
            raise UserError(
                f"{shard.path} has {shard.size / GiB:.2f} GiB, the shard cache {self.folder} may hold "
                f"{self.limit_bytes / GiB:.2f}; allow more with shard_cache_gib, or leave shard_cache out"
            )
        path = self._place(shard.path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._touch(path, shard):
                self._download(path, shard)
        except OSError as error:
            raise UserError(f"the shard cache {self.folder} cannot be used: {error}") from error
        return str(path)

    def _place(self, url: str) -> Path:
        digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
        return self.folder / f"{digest}.tar"

    def _touch(self, path: Path, shard: RemoteShard) -> bool:
        """Whether the shard's copy is there; it is then marked as opened now."""
        with suppress(FileNotFoundError):
            state = path.stat()
            if (state.st_size, state.st_mtime_ns) == (shard.size, shard.mtime_ns):
                os.utime(path, ns=(time.time_ns(), shard.mtime_ns))
                return True
        return False

    def _download(self, path: Path, shard: RemoteShard) -> None:
        """Fetches the shard, or waits while another process does."""
        part = path.with_name(f".{path.name}.part")
        with _locked(part) as file:
            if file is None or self._touch(path, shard):
                return
            try:
                while not self._reserve(file, part, shard.size):
                    time.sleep(WAIT_s)  # other downloads fill the folder; they can be removed once complete
                for offset in range(0, shard.size, PIECE_bytes):
                    os.pwrite(file, shard.read(offset, PIECE_bytes), offset)
                os.utime(part, ns=(time.time_ns(), shard.mtime_ns))
                part.rename(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _reserve(self, file: int, path: Path, size: int) -> bool:
        """Gives the open file at `path` its size, after removing the least recently opened shards to make room."""
        with _locked(self.folder / ".room"):
            shards = {shard: shard.stat() for shard in self.folder.glob("*.tar")}
            loading = [part for part in self.folder.glob(".*.part") if part != path and not _abandoned(part)]
            total = size + sum(state.st_size for state in shards.values())
            for part in loading:
                with suppress(FileNotFoundError):  # it is complete by now
                    total += part.stat().st_size
            for shard in sorted(shards, key=lambda shard: shards[shard].st_atime_ns):
                if total <= self.limit_bytes:
                    break
                shard.unlink(missing_ok=True)
                total -= shards[shard].st_size
            if total <= self.limit_bytes:
                os.ftruncate(file, size)
            return total <= self.limit_bytes


@contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """A file, open and locked by this process; None where it was renamed or removed while waiting."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            same = os.stat(path).st_ino == os.fstat(file).st_ino
        except FileNotFoundError:
            same = False
        yield file if same else None
    finally:
        os.close(file)


def _abandoned(part: Path) -> bool:
    """Whether a download's process is gone; the file then is, too."""
    try:
        file = os.open(part, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)
