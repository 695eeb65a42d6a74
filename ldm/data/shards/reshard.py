"""The samples of shards, to be packed into other shards, their members as they are."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.data.shards.members import TornTar, members, split_name
from ldm.data.shards.packable import Encode, Packable, as_json, member_bytes, picture_facts
from ldm.data.shards.remote import is_remote
from ldm.data.shards.shards import Shard, expand, open_shard, relative_names
from ldm.data.shards.tar import DAMAGE, IMAGE_KINDS, LEFT_OUT, scan_shard
from ldm.errors import UserError


def is_shards(source: str | Path) -> bool:
    """Whether a source is shards: a name or pattern of .tar files, or a folder that holds some."""
    return ".tar" in Path(source).name or is_remote(str(source)) or any(Path(source).glob("*.tar"))


@dataclass(frozen=True)
class ShardSample:
    """A sample of a shard; its members are kept as they are."""

    path: str
    key: str
    members: tuple[tuple[str, int, int], ...]  # (extension, offset, size)
    renamed: bool = False

    @property
    def tar_bytes(self) -> int:
        return sum(member_bytes(f"{self.key}.{extension}", size) for extension, _, size in self.members)

    def identity(self) -> list[Any]:
        return [self.key, self.members]

    def parts(self, encode: Encode, touched: bool) -> dict[str, bytes]:
        shard = _open(self.path)
        parts = {extension: shard.read(offset, size) for extension, offset, size in self.members}
        short = [extension for extension, _, size in self.members if len(parts[extension]) != size]
        if short:
            raise UserError(f"{self.path} changed while it was packed: {self.key}.{short[0]} is cut; start again")
        return self._encoded(parts, encode) if touched else parts

    def _encoded(self, parts: dict[str, bytes], encode: Encode) -> dict[str, bytes]:
        """The parts with the picture encoded anew, in its place, and the JSON told so."""
        image = next(extension for extension in parts if extension.lower() in IMAGE_KINDS)
        stored, kind, size = encode(parts[image])
        if stored == parts[image]:
            return parts
        described = next((extension for extension in parts if extension.lower() == "json"), "json")
        facts = json.loads(parts.get(described) or b"{}")
        if not isinstance(facts, dict):
            raise ValueError("its JSON is no object")
        renewed = {kind if extension == image else extension: data for extension, data in parts.items()}
        return renewed | {kind: stored, described: as_json(facts | picture_facts(stored, size))}


@lru_cache(maxsize=8)
def _open(path: str) -> Shard:
    return open_shard(path)


def read_shards(source: str | Path, allow_damaged: bool = False) -> tuple[list[Packable], Counter[str]]:
    """The whole samples of shards in their order, and how many were left out by reason.

    A key that several shards have gets `_` and a hash of its shard's name in each of them. Raises UserError for
    a damaged shard unless it is allowed.
    """
    paths = expand(source)
    left_out: Counter[str] = Counter()
    samples: list[ShardSample] = []
    for path in paths:
        scan = scan_shard(path)
        damage = [kind for kind in DAMAGE if scan.problems[kind]]
        if damage and not allow_damaged:
            raise UserError(f"{path} is damaged: {'; '.join(scan.examples)}; --allow-damaged packs its whole samples")
        for kind in (*DAMAGE, *LEFT_OUT, "no picture"):
            left_out[kind] += scan.problems[kind]
        samples += _samples(path, {key.decode() for key in scan.keys})
    names = dict(zip(paths, relative_names(paths), strict=True))
    often = Counter(sample.key for sample in samples)
    told: list[Packable] = []
    for sample in samples:
        if often[sample.key] > 1:
            sample = replace(sample, key=f"{sample.key}_{_hash(names[sample.path], sample.key)}", renamed=True)
        told.append(sample)
    return told, +left_out


def _hash(*address: str) -> str:
    return hashlib.sha256("\0".join(address).encode()).hexdigest()[:8]


def _samples(path: str, keys: set[str]) -> list[ShardSample]:
    """The samples of a shard with these keys, every member included."""
    parts: dict[str, list[tuple[str, int, int]]] = {}
    try:
        for member in members(_open(path)):
            named = split_name(member.name)
            if named is not None and named[0] in keys:
                extension = member.name[len(named[0]) + 1 :]
                parts.setdefault(named[0], []).append((extension, member.offset, member.size))
    except TornTar:  # its whole samples were counted before
        pass
    return [ShardSample(path, key, tuple(found)) for key, found in parts.items() if key in keys]
