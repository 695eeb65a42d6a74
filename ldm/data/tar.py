"""The samples of one tar shard, found from its headers alone: where each part lies, and what is wrong.

The header is POSIX.1-1988 ustar; long names come as GNU "L" members or as pax records (POSIX.1-2001).
Grouping is webdataset's: a sample's key is its members' path up to the first dot of the base name, and its
members follow one another.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.data.shards import ShardFile, open_shard

BLOCK_bytes = 512
AHEAD_bytes = 4096
IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
LATENTS = "latents.safetensors"  # what a first stage made of a picture stands in its place
PICTURE_KINDS = (*IMAGE_KINDS, LATENTS)
NO_CAPTION, TEXT_CAPTION, JSON_CAPTION = 0, 1, 2
DAMAGE = ("truncated", "interleaved", "duplicate")
PROBLEMS = (*DAMAGE, "no picture", "no caption")

COLUMNS: dict[str, type[np.generic]] = {
    "image_offset": np.int64,
    "image_size": np.int64,
    "image_kind": np.uint8,
    "text_offset": np.int64,
    "text_size": np.int64,
    "json_offset": np.int64,
    "json_size": np.int64,
    "caption": np.uint8,
    "width": np.int32,
    "height": np.int32,
}


class TornTar(Exception):
    """A tar file that ends or stops making sense before its end-of-archive block."""


class Member(NamedTuple):
    """A file in a tar: its name, the offset of its first byte, its size in bytes."""

    name: str
    offset: int
    size: int


class _Ahead:
    """Reads small ranges through a window of a few kilobytes, as headers and captions lie close together."""

    def __init__(self, shard: ShardFile) -> None:
        self.shard = shard
        self.start = 0
        self.bytes = b""

    def read(self, offset: int, size: int) -> bytes:
        at = offset - self.start
        if at < 0 or at + size > len(self.bytes):
            self.start, self.bytes, at = offset, self.shard.read(offset, max(size, AHEAD_bytes)), 0
        return self.bytes[at : at + size]


def _number(text: bytes) -> int:
    """A header's number: octal digits, or base 256 where the first bit is set (GNU, for 8 GiB and more)."""
    if text[0] & 0x80:
        return int.from_bytes(text, "big") & ((1 << (8 * len(text) - 1)) - 1)
    return int(text.rstrip(b" \0").lstrip() or b"0", 8)


def _pax(records: bytes) -> dict[str, str]:
    """The "length key=value" records of an extended header."""
    found: dict[str, str] = {}
    while records:
        length, _, rest = records.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            break
        name, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        found[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        records = records[int(length) :]
    return found


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _check(header: bytes, offset: int, end: int) -> None:
    """Raises TornTar unless this is a header with the right sum (its own field as blanks)."""
    if len(header) < BLOCK_bytes:
        raise TornTar(f"the file ends at byte {end} without an end-of-archive block")
    try:
        stated = _number(header[148:156])
    except ValueError:
        stated = -1
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != stated:
        raise TornTar(f"byte {offset} is no tar header")


def members(shard: ShardFile, ahead: _Ahead | None = None) -> Iterator[Member]:
    """The regular files of a tar, in order. Raises TornTar where it is cut or broken."""
    ahead = ahead or _Ahead(shard)
    offset, extended = 0, dict[str, str]()
    while any(header := ahead.read(offset, BLOCK_bytes)) or not header:
        _check(header, offset, shard.size)
        kind, data = header[156:157], offset + BLOCK_bytes
        regular = kind in b"0\x007"
        size = int(extended["size"]) if regular and "size" in extended else _number(header[124:136])
        name = extended.get("path") or _name(header)
        if data + size > shard.size:
            raise TornTar(f"{name} should end at byte {data + size}, the file ends at {shard.size}")
        if kind == b"L":
            extended["path"] = ahead.read(data, size).split(b"\0", 1)[0].decode("utf-8", "replace")
        elif kind == b"x":
            extended.update(_pax(ahead.read(data, size)))
        elif kind not in b"gK":
            extended = {}
            if regular:
                yield Member(name, data, size)
        offset = data + -(-size // BLOCK_bytes) * BLOCK_bytes


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) as webdataset splits a member's name; None for what it leaves out."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or (stem.startswith("__") and stem.endswith("__")):
        return None
    return folder + slash + stem, extension.lower()


@dataclass
class ShardScan:
    """What a shard holds: COLUMNS of its whole samples, their keys, and what was wrong."""

    path: str
    size_bytes: int
    mtime_ns: int
    columns: dict[str, NDArray[np.generic]]
    keys: list[bytes]
    problems: dict[str, int]
    examples: list[str]

    @property
    def keys_digest(self) -> str:
        return hashlib.blake2b(b"\n".join(self.keys), digest_size=16).hexdigest()


@dataclass
class _Grouping:
    """The samples of a tar as its members pass by."""

    ahead: _Ahead
    rows: list[tuple[int, ...] | None] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    seen: dict[str, tuple[int | None, frozenset[str]]] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PROBLEMS, 0))
    examples: list[str] = field(default_factory=list)

    def problem(self, kind: str, what: str) -> None:
        self.problems[kind] += 1
        if kind in DAMAGE and len(self.examples) < 5:
            self.examples.append(f"{kind}: {what}")

    def close(self, key: str, parts: dict[str, Member], repeated: str) -> None:
        """Ends the sample `key` with its parts by extension; `repeated` is an extension that came twice."""
        row, extensions = self.seen.get(key, (None, frozenset[str]()))
        if repeated or extensions & parts.keys():
            self.problem("duplicate", f"{key}.{repeated or min(extensions & parts.keys())} is there twice")
        elif extensions:
            self.problem("interleaved", f"the parts of {key} do not follow one another")
        if repeated or extensions:  # neither copy is to be trusted
            if row is not None:
                self.rows[row] = None
            self.seen[key] = (None, extensions | parts.keys())
            return
        columns = self._columns(parts)
        if columns is None:
            self.problem("no picture", key)
            self.seen[key] = (None, frozenset(parts))
            return
        if columns[7] == NO_CAPTION:
            self.problem("no caption", key)
        self.seen[key] = (len(self.rows), frozenset(parts))
        self.rows.append(columns)
        self.keys.append(key)

    def _columns(self, parts: dict[str, Member]) -> tuple[int, ...] | None:
        """One row in the order of COLUMNS; None without a picture. An absent part has size -1."""
        image = next((part for part in parts if part in PICTURE_KINDS), None)
        if image is None:
            return None
        absent = Member("", 0, -1)
        text, described = parts.get("txt", absent), parts.get("json", absent)
        facts = self._json(described) if described.size > 0 else {}
        spoken = isinstance(facts.get("caption"), str) and bool(facts["caption"])
        caption = TEXT_CAPTION if text.size > 0 else JSON_CAPTION if spoken else NO_CAPTION
        width, height = (v if isinstance(v := facts.get(k), int) else 0 for k in ("width", "height"))
        picture = (parts[image].offset, parts[image].size, PICTURE_KINDS.index(image))
        places = (text.offset, text.size, described.offset, described.size)
        return (*picture, *places, caption, width, height)

    def _json(self, member: Member) -> dict[str, object]:
        try:
            facts = json.loads(self.ahead.read(member.offset, member.size))
        except ValueError:
            return {}
        return facts if isinstance(facts, dict) else {}


def scan_shard(path: str) -> ShardScan:
    """Reads a shard's headers and JSON parts once. Damage is counted, never raised."""
    shard = open_shard(path)
    grouping = _Grouping(_Ahead(shard))
    key, parts, repeated = "", dict[str, Member](), ""
    try:
        for member in members(shard, grouping.ahead):
            named = split_name(member.name)
            if named is None:
                continue
            if named[0] != key:
                if parts:
                    grouping.close(key, parts, repeated)
                key, parts, repeated = named[0], {}, ""
            repeated = named[1] if named[1] in parts else repeated
            parts[named[1]] = member
        if parts:
            grouping.close(key, parts, repeated)
    except (TornTar, ValueError) as torn:  # a cut file, a broken number; the sample at the tear is left out
        grouping.problem("truncated", str(torn))
    finally:
        shard.close()
    return _as_scan(shard, grouping)


def _as_scan(shard: ShardFile, grouping: _Grouping) -> ShardScan:
    kept = [(key, row) for key, row in zip(grouping.keys, grouping.rows, strict=True) if row is not None]
    table = np.array([row for _, row in kept], dtype=np.int64).reshape(-1, len(COLUMNS))
    return ShardScan(
        path=shard.path,
        size_bytes=shard.size,
        mtime_ns=shard.mtime_ns,
        columns={name: table[:, i].astype(kind) for i, (name, kind) in enumerate(COLUMNS.items())},
        keys=[key.encode() for key, _ in kept],
        problems=grouping.problems,
        examples=grouping.examples,
    )
