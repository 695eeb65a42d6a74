"""Shards behind a URL: byte ranges by HTTP, or by whatever fsspec knows (s3://, gs://, ...), tried until they come.

What passes by itself (5xx, 408, 429, a broken or silent connection, a body that is too short) is tried again
after 0.5, 1, 2, ... at most 30 seconds until a deadline; then a UserError ends the run. What does not pass by
itself (404, 403, another file than before) ends it at once. A read never gives other bytes than the shard's.
"""

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar

import fsspec
import requests

from ldm.errors import UserError

Result = TypeVar("Result")

FIRST_delay_s = 0.5
LAST_delay_s = 30.0
LEAST_bytes = 64 << 10  # of one request: a sample's text lies beside its JSON
PIECE_bytes = 1 << 16
STAMPS = ("LastModified", "last_modified", "mtime", "updated", "created", "ETag", "etag", "generation")


@dataclass(frozen=True)
class Remote:
    """How shards behind a URL are read.

    deadline_s       how long a request that fails is tried again before the run ends
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
    """A failure that may pass by itself; `delay_s` is how long the server asks to wait."""

    def __init__(self, what: str, delay_s: float = 0.0) -> None:
        super().__init__(what)
        self.delay_s = delay_s


def retry(url: str, attempt: Callable[[float], Result], remote: Remote) -> Result:
    """What `attempt(seconds that it may take)` returns, tried again where it raises Transient.

    Raises UserError at the deadline, with the URL, what happened (the last try may have had a moment only, so what
    happened most often comes first) and how often it was tried.
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
                told = ", ".join(what for what, _ in failures.most_common(3))
                raise UserError(
                    f"{url} could not be read: {told} ({failures.total()} tries in {spent:.0f} s, the deadline is "
                    f"{remote.deadline_s:g} s); look at the server, or allow more with deadline_s, and resume"
                ) from error
            time.sleep(wait)
            delay = min(2 * delay, LAST_delay_s)


class Ranges(Protocol):
    """A file of which ranges can be asked for; each method makes one try."""

    def stat(self, timeout_s: float, left_s: float) -> tuple[int, int]:
        """(size in bytes, a stamp that changes with the contents, in ns)."""

    def get(self, offset: int, size: int, total: int, timeout_s: float, left_s: float) -> bytes:
        """The bytes [offset, offset + size) of a file of `total` bytes."""


class _Sessions(threading.local):
    """A session for each thread of each process, so that connections are kept and never shared."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.session = requests.Session()

    def get(self) -> requests.Session:
        if self.pid != os.getpid():  # forked: the connections are the parent's
            self.__init__()  # type: ignore[misc]
        return self.session


_sessions = _Sessions()


class HttpRanges:
    """Ranges of a file behind http:// or https:// (RFC 9110, section 14)."""

    def __init__(self, url: str) -> None:
        self.url = url

    def stat(self, timeout_s: float, left_s: float) -> tuple[int, int]:
        with self._ask(0, 1, timeout_s) as answer:
            if answer.status_code == 416:  # an empty file has no first byte
                return 0, _stamp(answer.headers)
            return self._total(answer), _stamp(answer.headers)

    def get(self, offset: int, size: int, total: int, timeout_s: float, left_s: float) -> bytes:
        end = time.monotonic() + left_s
        with self._ask(offset, size, timeout_s) as answer:
            if answer.status_code == 416 or self._total(answer) != total:
                raise UserError(f"{self.url} changed after it was opened; start again")
            body = bytearray()
            try:
                for piece in answer.iter_content(PIECE_bytes):
                    body += piece
                    if time.monotonic() > end or len(body) > size:
                        break
            except requests.RequestException as error:
                raise Transient(f"the connection broke after {len(body)} of {size} bytes ({_told(error)})") from error
        if len(body) != size:
            raise Transient(f"{len(body)} bytes came in place of {size}")
        return bytes(body)

    def _ask(self, offset: int, size: int, timeout_s: float) -> requests.Response:
        headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        try:
            answer = _sessions.get().get(self.url, headers=headers, timeout=timeout_s, stream=True)
        except (requests.exceptions.InvalidURL, requests.exceptions.TooManyRedirects) as error:
            raise UserError(f"{self.url} cannot be asked for: {error}") from error
        except requests.RequestException as error:
            raise Transient(_told(error)) from error
        status = answer.status_code
        if status in (206, 416):
            return answer
        answer.close()
        if status >= 500 or status in (408, 429):
            raise Transient(f"status {status} {answer.reason}", _retry_after(answer.headers))
        if status == 200:
            raise UserError(f"the server of {self.url} gives no ranges; copy the shards, or stream them by pipe:curl")
        raise UserError(f"{self.url}: status {status} {answer.reason}; check the address and who may read it")

    def _total(self, answer: requests.Response) -> int:
        """The file's size, from `Content-Range: bytes 0-0/1234`."""
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if not total.isdigit():
            raise UserError(f"the server of {self.url} does not say how long the file is; copy the shards")
        return int(total)


def _told(error: Exception) -> str:
    """The innermost cause, whose text is the shortest."""
    inner: BaseException = error
    while (deeper := inner.__cause__ or inner.__context__) is not None:
        inner = deeper
    return f"{type(inner).__name__}: {inner}"[:200]


def _retry_after(headers: Mapping[str, str]) -> float:
    text = headers.get("Retry-After", "")
    return float(text) if text.isdigit() else 0.0


def _stamp(headers: Mapping[str, str]) -> int:
    """The time of change in ns; without one, a number made of the entity tag, 0 without either."""
    try:
        return int(parsedate_to_datetime(headers["Last-Modified"]).timestamp()) * 1_000_000_000
    except (KeyError, ValueError):
        return _hashed(headers["ETag"]) if "ETag" in headers else 0


def _hashed(text: str) -> int:
    """A whole number of seconds below 2^31, in ns, so that a file's time of change can hold it."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "big") >> 1) * 1_000_000_000


class FsspecRanges:
    """Ranges of a file of any file system that fsspec knows; the file system's own timeouts hold."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._open()

    def _open(self) -> None:
        self.pid = os.getpid()
        self.files, self.path = file_system(self.url)

    def stat(self, timeout_s: float, left_s: float) -> tuple[int, int]:
        facts = self._try(lambda: self.files.info(self.path))
        told = [str(facts[name]) for name in STAMPS if facts.get(name) is not None]
        return int(facts["size"]), _hashed("\n".join(told)) if told else 0

    def get(self, offset: int, size: int, total: int, timeout_s: float, left_s: float) -> bytes:
        data: bytes = self._try(lambda: self.files.cat_file(self.path, start=offset, end=offset + size))
        if len(data) != size:
            raise Transient(f"{len(data)} bytes came in place of {size}")
        return data

    def _try(self, action: Callable[[], Any]) -> Any:
        if self.pid != os.getpid():  # forked: an asynchronous file system is the parent's
            self._open()
        try:
            return action()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError) as error:
            raise UserError(f"{self.url}: {type(error).__name__} {error}; check the address and its rights") from error
        except Exception as error:  # each file system has its own
            raise Transient(f"{type(error).__name__}: {error}") from error


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it) of a URL. Raises UserError where its package is missing."""
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error}") from error
    return files, path


def open_ranges(url: str) -> Ranges:
    """The file behind a URL; nothing is asked for yet."""
    return HttpRanges(url) if url.startswith(("http://", "https://")) else FsspecRanges(url)


def remote_state(url: str, remote: Remote) -> tuple[int, int]:
    """(size in bytes, stamp in ns) of a remote shard. Raises UserError."""
    ranges = open_ranges(url)
    return retry(url, lambda left: ranges.stat(min(remote.timeout_s, left), left), remote)


class RemoteShard:
    """One remote shard: byte ranges of it, its size, a stamp of its contents as its time of change."""

    jump_bytes = 1 << 20  # what 10 ms are worth at 100 MB/s

    def __init__(self, url: str, remote: Remote, state: tuple[int, int] | None = None) -> None:
        self.path = url
        self.remote = remote
        self.size, self.mtime_ns = state or remote_state(url, remote)
        self._ranges = open_ranges(url)
        self._last = (0, b"")  # (offset, bytes) of the last request

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends before."""
        size = max(0, min(size, self.size - offset))
        start, held = self._last
        if not start <= offset <= offset + size <= start + len(held):
            asked = min(max(size, LEAST_bytes), self.size - offset)
            start, held = self._last = (offset, self._get(offset, asked))
        return held[offset - start : offset - start + size]

    def _get(self, offset: int, size: int) -> bytes:
        if size <= 0:
            return b""
        total, timeout_s = self.size, self.remote.timeout_s
        return retry(
            self.path, lambda left: self._ranges.get(offset, size, total, min(timeout_s, left), left), self.remote
        )

    def close(self) -> None:
        self._last = (0, b"")
