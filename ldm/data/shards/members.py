"""The members of a tar file, read from its headers alone.

The header is POSIX.1-1988 ustar; long names come as GNU "L" members or as pax records (POSIX.1-2001). Sparse
members, whose data is not stored as it is in the file, are skipped.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

from ldm.data.shards.shards import Shard

BLOCK_bytes = 512
REGULAR = frozenset(b"0\x007")  # kinds of members that are files
BLANKS = 8 * ord(" ") - 1
DIGITS = frozenset(b"01234567")
END = bytes(BLOCK_bytes)  # an end-of-archive block
AHEAD_bytes = 4096  # a window after a jump
WINDOW_bytes = 8 << 20  # a window of a file that is read from end to end


class TornTar(Exception):
    """A tar file that ends or becomes invalid before its end-of-archive block."""


class Member(NamedTuple):
    """A file in a tar: its name, the offset of its first byte, its size in bytes."""

    name: str
    offset: int
    size: int


class ReadAhead:
    """Reads small ranges of a shard through a window that grows where reading in order is cheaper than jumping.

    A jump costs as much as `shard.jump_bytes` that are read in order. While the gaps between the ranges are
    below that, each window is twice as long as the one before; a wider gap is jumped over.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.window = max(AHEAD_bytes, shard.jump_bytes // 16)
        self.start = 0
        self.bytes = b""

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends before."""
        at = offset - self.start
        if at < 0 or at + size > len(self.bytes):
            gap = at - len(self.bytes)
            small = max(AHEAD_bytes, self.shard.jump_bytes // 16)
            self.window = min(2 * self.window, WINDOW_bytes) if gap < self.shard.jump_bytes else small
            self.start, self.bytes, at = offset, self.shard.read(offset, max(size, self.window)), 0
        return self.bytes[at : at + size]

    def peek(self, offset: int, size: int) -> bytes:
        """The part of the range that is in the window."""
        at = offset - self.start
        return self.bytes[at : at + size] if at >= 0 else b""


def _number(text: bytes) -> int:
    """A header's number: octal digits, or base 256 where the first bit is set (GNU, for 8 GiB and more)."""
    if text[0] & 0x80:
        return int.from_bytes(text, "big") & ((1 << (8 * len(text) - 1)) - 1)
    return int(text.rstrip(b" \0") or b"0", 8)


def _pax(records: bytes) -> dict[str, str]:
    """The "length key=value" records of an extended header."""
    values: dict[str, str] = {}
    while records:
        length, _, rest = records.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            break
        name, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        values[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        records = records[int(length) :]
    return values


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "replace")


def _check(header: bytes, offset: int, end: int) -> None:
    """Raises TornTar unless this is a header with the right sum (its own field as blanks).

    The lower half of Adler-32 is 1 + the sum of the bytes, modulo 65521 (RFC 1950).
    """
    if len(header) < BLOCK_bytes:
        raise TornTar(f"the file ends at byte {end} without an end-of-archive block")
    field = header[148:156]
    try:
        stated = int(field.rstrip(b" \0") or b"0", 8)
    except ValueError:
        stated = -1
    if ((zlib.adler32(header) & 0xFFFF) + BLANKS - sum(field) - stated) % 65521 or stated < 0:
        raise TornTar(f"byte {offset} is not a tar header")


def _after_map(ahead: ReadAhead, header: bytes, data: int) -> int:
    """Where the data of a GNU sparse member begins: its map may continue in further blocks."""
    more = header[482]
    while more:
        more = (ahead.read(data, BLOCK_bytes) + bytes(BLOCK_bytes))[504]
        data += BLOCK_bytes
    return data


def members(shard: Shard, ahead: ReadAhead | None = None) -> Iterator[Member]:
    """The regular files of a tar, in order. Raises TornTar where it is cut or broken."""
    ahead = ahead or ReadAhead(shard)
    offset, extended = 0, dict[str, str]()
    while (header := ahead.read(offset, BLOCK_bytes)) != END:
        _check(header, offset, shard.size)
        kind, data = header[156], offset + BLOCK_bytes
        regular = kind in REGULAR
        if extended and regular and "size" in extended:
            size = int(extended["size"])
        elif header[135] == 0 and header[124] in DIGITS:  # the usual case
            size = int(header[124:135], 8)
        else:
            size = _number(header[124:136])
        name = (extended.get("path") if extended else None) or _name(header)
        if kind == ord("S"):
            data = _after_map(ahead, header, data)
        if data + size > shard.size:
            raise TornTar(f"{name} should end at byte {data + size}, the file ends at {shard.size}")
        if regular:
            if not extended or not any(record.startswith("GNU.sparse.") for record in extended):
                yield Member(name, data, size)
            extended = {}
        elif kind == ord("L"):
            extended["path"] = ahead.read(data, size).split(b"\0", 1)[0].decode("utf-8", "replace")
        elif kind == ord("x"):
            extended.update(_pax(ahead.read(data, size)))
        elif kind not in b"gK":
            extended = {}
        offset = data + -(-size // BLOCK_bytes) * BLOCK_bytes


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) as webdataset splits a member's name; None for names that it leaves out."""
    folder, slash, base = name.rpartition("/") if "/" in name else ("", "", name)
    stem, dot, extension = base.partition(".")
    if not stem or not dot or (stem.startswith("__") and stem.endswith("__")):
        return None
    return folder + slash + stem, extension.lower()
