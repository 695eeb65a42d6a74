"""The samples of one tar shard, from its headers: the place of each part, and the problems.

Grouping is webdataset's: a sample's key is its members' path up to the first dot of the base name, and its
members follow one another.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ldm.data.shards.header import picture_size
from ldm.data.shards.members import Member, ReadAhead, TornTar, members, split_name
from ldm.data.shards.numbers import Numbers, number
from ldm.data.shards.picture import MAX_bytes, MAX_pixels
from ldm.data.shards.remote import Remote
from ldm.data.shards.shards import Shard, open_shard
from ldm.errors import UserError

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
LATENTS = "latents.safetensors"  # replaces a picture that a first stage encoded
PICTURE_KINDS = (*IMAGE_KINDS, LATENTS)
NO_CAPTION, TEXT_CAPTION, JSON_CAPTION = 0, 1, 2
MAX_text_bytes = 1 << 20  # of a text or a JSON part
HEAD_bytes = 2048  # of a picture, stored until its JSON part is read

DAMAGE = ("truncated", "interleaved", "duplicate")
LEFT_OUT = ("oversized", "gigapixel")
PROBLEMS = (*DAMAGE, *LEFT_OUT, "no picture", "unreadable picture", "no caption")

COLUMNS: dict[str, type[np.generic]] = {
    "image_offset": np.int64,
    "image_size": np.int32,
    "image_kind": np.uint8,
    "text_offset": np.int64,
    "text_size": np.int32,
    "json_offset": np.int64,
    "json_size": np.int32,
    "caption": np.uint8,
    "width": np.int32,
    "height": np.int32,
}


@dataclass
class ShardScan:
    """The contents of a shard: COLUMNS of its whole samples, their JSON's numbers, their keys, the problems."""

    path: str
    size_bytes: int
    mtime_ns: int
    columns: dict[str, NDArray[np.generic]]
    numbers: dict[str, NDArray[np.float64]]
    keys: list[bytes]
    problems: dict[str, int]
    examples: list[str]

    @property
    def keys_digest(self) -> str:
        return hashlib.blake2b(b"\n".join(self.keys), digest_size=16).hexdigest()


@dataclass(slots=True)
class _Open:
    """The sample whose members are being read."""

    key: str
    start: str = ""  # of the names of its members
    parts: dict[str, Member] = field(default_factory=dict)
    repeated: str = ""  # an extension that came twice
    image: str = ""  # the extension of its first picture
    head: bytes = b""  # of the picture
    json: bytes = b""  # the JSON part


@dataclass
class _Grouping:
    """The samples of a tar, grouped as its members are read."""

    ahead: ReadAhead
    rows: list[tuple[int, ...] | None] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    blind: set[str] = field(default_factory=set)  # keys without a picture
    numbers: Numbers = field(default_factory=Numbers)
    seen: dict[str, tuple[int | None, dict[str, Member]]] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PROBLEMS, 0))
    examples: list[str] = field(default_factory=list)

    def problem(self, kind: str, description: str) -> None:
        """Counts one of DAMAGE or LEFT_OUT."""
        self.problems[kind] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{kind}: {description}")

    def add(self, sample: _Open, extension: str, member: Member) -> None:
        """Adds a member to its sample, while its first bytes are in the window."""
        if extension in sample.parts:
            sample.repeated = extension
        sample.parts[extension] = member
        if extension == "json":
            sample.json = self.ahead.read(member.offset, min(member.size, MAX_text_bytes))
        elif extension in PICTURE_KINDS and not sample.image:
            sample.image = extension
            sample.head = self.ahead.peek(member.offset, min(member.size, HEAD_bytes))

    def close(self, sample: _Open) -> None:
        """Ends a sample: it becomes a row, or a problem."""
        key, parts = sample.key, sample.parts
        if sample.repeated or key in self.seen:  # neither copy is trusted
            row, before = self.seen.get(key, (None, {}))
            both = before.keys() & parts.keys()
            if sample.repeated or both:
                self.problem("duplicate", f"{key}.{sample.repeated or min(both)} is there twice")
            else:
                self.problem("interleaved", f"the parts of {key} do not follow one another")
            if row is not None:
                self.rows[row] = None
            self.seen[key] = (None, before | parts)
            self.blind.discard(key)
            return
        columns = self._columns(sample)
        self.seen[key] = (None if columns is None else len(self.rows), parts)
        if columns is not None:
            self.rows.append(columns)
            self.keys.append(key)

    def _columns(self, sample: _Open) -> tuple[int, ...] | None:
        """One row in the order of COLUMNS; None for a sample that is left out. An absent part has size -1."""
        key, parts = sample.key, sample.parts
        if not sample.image:
            self.blind.add(key)
            return None
        absent = Member("", 0, -1)
        picture, text, json_part = parts[sample.image], parts.get("txt", absent), parts.get("json", absent)
        for part, limit in ((picture, MAX_bytes), (text, MAX_text_bytes), (json_part, MAX_text_bytes)):
            if part.size > limit:
                self.problem("oversized", f"{part.name} has {part.size} bytes, more than {limit}")
                return None
        facts = json_object(sample.json)
        width, height = self._size(sample, picture, facts)
        if width * height > MAX_pixels:
            self.problem("gigapixel", f"{picture.name} has {width} x {height} pixels, more than {MAX_pixels}")
            return None
        in_json = isinstance(facts.get("caption"), str) and bool(facts["caption"])
        caption = TEXT_CAPTION if text.size > 0 else JSON_CAPTION if in_json else NO_CAPTION
        self.numbers.add(facts)
        places = (text.offset, text.size, json_part.offset, json_part.size)
        return (picture.offset, picture.size, PICTURE_KINDS.index(sample.image), *places, caption, width, height)

    def _size(self, sample: _Open, picture: Member, facts: dict[str, object]) -> tuple[int, int]:
        """(width, height) as the JSON states them, else the picture's header; (0, 0): unknown."""
        width, height = facts.get("width"), facts.get("height")
        if not (type(width) is int and type(height) is int):
            width, height = number(width), number(height)
        if picture.size > 0 and width >= 1 and height >= 1 and width * height <= MAX_pixels:
            return int(width), int(height)

        def read(offset: int, size: int) -> bytes:
            if offset + size <= len(sample.head):
                return sample.head[offset : offset + size]
            return self.ahead.shard.read(picture.offset + offset, max(0, min(size, picture.size - offset)))

        return picture_size(read) or (0, 0)


def json_object(data: bytes) -> dict[str, object]:
    """A JSON part; empty where it is none, corrupt or no object."""
    if not data:
        return {}
    try:
        facts = json.loads(str(data, "utf-8"))
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def scan_shard(path: str, remote: Remote | None = None) -> ShardScan:
    """Reads a shard's headers and JSON parts once, a remote one's by ranges. Damage is counted, never raised."""
    shard = open_shard(path, replace(remote, shard_cache=None) if remote else None)
    grouping = _Grouping(ReadAhead(shard))
    sample = _Open("")
    try:
        for member in members(shard, grouping.ahead):
            name = member.name
            if sample.start and name.startswith(sample.start):  # the usual case: the key is the same
                extension = name[len(sample.start) :]
                if "/" not in extension:
                    grouping.add(sample, extension.lower(), member)
                    continue
            named = split_name(name)
            if named is None:
                continue
            if sample.parts:
                grouping.close(sample)
            sample = _Open(named[0], named[0] + ".")
            grouping.add(sample, named[1], member)
        if sample.parts:
            grouping.close(sample)
    except UserError:
        raise
    except (TornTar, ValueError) as torn:  # a cut file, a broken number; the sample at the tear is left out
        grouping.problem("truncated", str(torn))
    finally:
        shard.close()
    return _as_scan(shard, grouping)


def _as_scan(shard: Shard, grouping: _Grouping) -> ShardScan:
    rows = [i for i, row in enumerate(grouping.rows) if row is not None]
    table = np.array([grouping.rows[i] for i in rows], dtype=np.int64).reshape(-1, len(COLUMNS))
    columns = {name: table[:, i].astype(kind) for i, (name, kind) in enumerate(COLUMNS.items())}
    counted = {
        "no picture": len(grouping.blind),
        "unreadable picture": int((columns["width"] == 0).sum()),
        "no caption": int((columns["caption"] == NO_CAPTION).sum()),
    }
    return ShardScan(
        path=shard.path,
        size_bytes=shard.size,
        mtime_ns=shard.mtime_ns,
        columns=columns,
        numbers=grouping.numbers.columns(rows),
        keys=[grouping.keys[i].encode() for i in rows],
        problems=grouping.problems | counted,
        examples=grouping.examples,
    )
