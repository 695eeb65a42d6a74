"""Shards behind a URL: byte ranges by HTTP, or by any file system that fsspec knows (s3://, gs://, ...), with retries.

A temporary failure (5xx, 408, 429, a broken or silent connection, a body that is too short) is retried after
0.5, 1, 2, ... at most 30 seconds until a deadline; then a UserError ends the run. A permanent one (404, 403, a
file that changed) ends it at once. A read never returns other bytes than the shard's.
"""

import hashlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, TypeVar

import fsspec
import requests

from ldm.errors import UserError

Result = TypeVar("Result")

FIRST_delay_s = 0.5
LAST_delay_s = 30.0
LEAST_bytes = 64 << 10  # of one request: a sample's text is next to its JSON
PIECE_bytes = 1 << 16
STAMPS = ("LastModified", "last_modified", "mtime", "updated", "created", "ETag", "etag", "generation")


@dataclass(frozen=True)
class Remote:
    """How shards behind a URL are read.

    deadline_s       how long a failed request is retried before the run ends
    timeout_s        how long a connection may be silent
    shard_cache      a local folder for whole shards, shared by all processes; None: only ranges are read
    shard_cache_gib  what the folder may hold; the shards that were opened longest ago go
    """

    deadline_s: float = 300.0
    timeout_s: float = 30.0
    shard_cache: str | None = None
    shard_cache_gib: float = 100.0

    def __post_init__(self) -> None:
        for name in ("deadline_s", "timeout_s", "shard_cache_gib"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


class Transient(Exception):
    """A failure that may be temporary; `delay_s` is how long the server asks to wait."""

    def __init__(self, cause: str, delay_s: float = 0.0) -> None:
        super().__init__(cause)
        self.delay_s = delay_s


def retry(url: str, attempt: Callable[[float], Result], remote: Remote) -> Result:
    """What `attempt(seconds left)` returns, retried where it raises Transient.

    Raises UserError at the deadline, with the URL, the causes (the most frequent first, since the last try may have
    had little time) and the number of tries.
    """
    started, delay, failures = time.monotonic(), FIRST_delay_s, Counter[str]()
    while True:
        try:
            return attempt(max(0.001, started + remote.deadline_s - time.monotonic()))
        except Transient as error:
            failures[str(error)] += 1
            wait = max(delay, error.delay_s)
            spent = time.monotonic() - started
            if spent + wait > remote.deadline_s:
                causes = ", ".join(cause for cause, _ in failures.most_common(3))
                raise UserError(
                    f"{url} could not be read: {causes} ({failures.total()} tries in {spent:.0f} s, the deadline is "
                    f"{remote.deadline_s:g} s); look at the server, or allow more with deadline_s, and resume"
                ) from error
            time.sleep(wait)
            delay = min(2 * delay, LAST_delay_s)


@lru_cache(maxsize=1024)
def _session(process: int, thread: int) -> requests.Session:
    """The session of a thread of a process, so that connections are reused and never shared."""
    return requests.Session()


class RemoteShard(ABC):
    """One remote shard: byte ranges of it, its size, a stamp of its contents as its time of change.

    `state` is (size in bytes, stamp in ns) where it is known already. A subclass makes one try of each request.
    """

    jump_bytes = 1 << 20  # read in order in the time of one request: 10 ms at 100 MB/s

    def __init__(self, url: str, remote: Remote, state: tuple[int, int] | None = None) -> None:
        self.path = url
        self.remote = remote
        self._last = (0, b"")  # (offset, bytes) of the last request
        self.size, self.mtime_ns = state or retry(url, self._stat, remote)

    @abstractmethod
    def _stat(self, left_s: float) -> tuple[int, int]:
        """(size in bytes, a stamp that changes with the contents, in ns)."""

    @abstractmethod
    def _get(self, offset: int, size: int, left_s: float) -> bytes:
        """The bytes [offset, offset + size), all of which the file has."""

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends before."""
        size = max(0, min(size, self.size - offset))
        start, data = self._last
        if not start <= offset <= offset + size <= start + len(data):
            wanted = min(max(size, LEAST_bytes), self.size - offset)
            data = (
                retry(self.path, lambda left_s: self._get(offset, wanted, left_s), self.remote) if wanted > 0 else b""
            )
            start, self._last = offset, (offset, data)
        return data[offset - start : offset - start + size]

    def close(self) -> None:
        self._last = (0, b"")


class HttpShard(RemoteShard):
    """A shard behind http:// or https://, read by range requests (RFC 9110, section 14)."""

    def _stat(self, left_s: float) -> tuple[int, int]:
        with self._request(0, 1, left_s) as response:
            if response.status_code == 416:  # an empty file has no first byte
                return 0, _stamp(response.headers)
            return self._total(response), _stamp(response.headers)

    def _get(self, offset: int, size: int, left_s: float) -> bytes:
        end = time.monotonic() + left_s
        with self._request(offset, size, left_s) as response:
            if response.status_code == 416 or self._total(response) != self.size:
                raise UserError(f"{self.path} changed after it was opened; start again")
            body = bytearray()
            try:
                for piece in response.iter_content(PIECE_bytes):
                    body += piece
                    if time.monotonic() > end or len(body) > size:
                        break
            except requests.RequestException as error:
                cause = _root_cause(error)
                raise Transient(f"the connection broke after {len(body)} of {size} bytes ({cause})") from error
        return _complete(bytes(body), size)

    def _request(self, offset: int, size: int, left_s: float) -> requests.Response:
        headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        timeout_s = min(self.remote.timeout_s, left_s)
        session = _session(os.getpid(), threading.get_ident())
        try:
            response = session.get(self.path, headers=headers, timeout=timeout_s, stream=True)
        except (requests.exceptions.InvalidURL, requests.exceptions.TooManyRedirects) as error:
            raise UserError(f"{self.path} cannot be requested: {error}") from error
        except requests.RequestException as error:
            raise Transient(_root_cause(error)) from error
        status = response.status_code
        if status in (206, 416):
            return response
        response.close()
        if status >= 500 or status in (408, 429):
            wait = response.headers.get("Retry-After", "")
            raise Transient(f"status {status} {response.reason}", float(wait) if wait.isdigit() else 0.0)
        if status == 200:
            raise UserError(f"the server of {self.path} gives no ranges; copy the shards, or stream them by pipe:curl")
        raise UserError(f"{self.path}: status {status} {response.reason}; check the address and who may read it")

    def _total(self, response: requests.Response) -> int:
        """The file's size, from `Content-Range: bytes 0-0/1234`."""
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if not total.isdigit():
            raise UserError(f"the server of {self.path} does not say how long the file is; copy the shards")
        return int(total)


def _root_cause(error: Exception) -> str:
    """The innermost cause, whose text is the shortest."""
    inner: BaseException = error
    while (deeper := inner.__cause__ or inner.__context__) is not None:
        inner = deeper
    return f"{type(inner).__name__}: {inner}"[:200]


def _complete(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise Transient(f"{len(data)} bytes came instead of {size}")
    return data


def _stamp(headers: Mapping[str, str]) -> int:
    """The time of change in ns; without one, a hash of the entity tag, 0 without either."""
    try:
        return int(parsedate_to_datetime(headers["Last-Modified"]).timestamp()) * 1_000_000_000
    except (KeyError, ValueError):
        return _hash(headers["ETag"]) if "ETag" in headers else 0


def _hash(text: str) -> int:
    """A whole number of seconds below 2^31, in ns, so that a file's time of change can hold it."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "big") >> 1) * 1_000_000_000


class FsspecShard(RemoteShard):
    """A shard of any file system that fsspec knows; the file system's own timeouts hold."""

    def __init__(self, url: str, remote: Remote, state: tuple[int, int] | None = None) -> None:
        self._open(url)
        super().__init__(url, remote, state)

    def _open(self, url: str) -> None:
        self.pid = os.getpid()
        self.files, self.name = file_system(url)

    def _stat(self, left_s: float) -> tuple[int, int]:
        info = self._try(lambda: self.files.info(self.name))
        stamps = [str(info[name]) for name in STAMPS if info.get(name) is not None]
        return int(info["size"]), _hash("\n".join(stamps)) if stamps else 0

    def _get(self, offset: int, size: int, left_s: float) -> bytes:
        return _complete(self._try(lambda: self.files.cat_file(self.name, start=offset, end=offset + size)), size)

    def _try(self, request: Callable[[], Any]) -> Any:
        if self.pid != os.getpid():  # forked: an asynchronous file system is the parent's
            self._open(self.path)
        try:
            return request()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError) as error:
            raise UserError(f"{self.path}: {type(error).__name__} {error}; check the address and its rights") from error
        except Exception as error:  # each file system has its own
            raise Transient(f"{type(error).__name__}: {error}") from error


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it) of a URL. Raises UserError where its package is missing."""
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error}") from error
    return files, path


def open_remote(url: str, remote: Remote, state: tuple[int, int] | None = None) -> RemoteShard:
    """The shard behind a URL. Raises UserError where it is not there."""
    kind = HttpShard if url.startswith(("http://", "https://")) else FsspecShard
    return kind(url, remote, state)
