"""The samples of shards, to be packed into other shards with their members unchanged."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.data.shards.members import TornTar, members, split_name
from ldm.data.shards.packing import Packable, Packing, as_json, member_bytes
from ldm.data.shards.remote import is_remote
from ldm.data.shards.shards import Shard, expand, open_shard, relative_names
from ldm.data.shards.tar import DAMAGE, IMAGE_KINDS, LEFT_OUT, scan_shard
from ldm.errors import UserError


def is_shards(source: str | Path) -> bool:
    """Whether a source is shards: a name or pattern of .tar files, or a folder that holds some."""
    return ".tar" in Path(source).name or is_remote(str(source)) or any(Path(source).glob("*.tar"))


@dataclass(frozen=True)
class ShardSample(Packable):
    """A sample of a shard, whose members are copied unchanged."""

    members: tuple[tuple[str, int, int], ...] = ()  # (extension, offset, size)

    @property
    def tar_bytes(self) -> int:
        return sum(member_bytes(f"{self.key}.{extension}", size) for extension, _, size in self.members)

    def identity(self) -> list[Any]:
        return [self.key, self.members]

    def parts(self, packing: Packing) -> dict[str, bytes]:
        shard = _open(self.path)
        parts = {extension: shard.read(offset, size) for extension, offset, size in self.members}
        short = [extension for extension, _, size in self.members if len(parts[extension]) != size]
        if short:
            raise UserError(f"{self.path} changed while it was packed: {self.key}.{short[0]} is cut; start again")
        return parts if packing.keeps_pictures else _encode(parts, packing)


def _encode(parts: dict[str, bytes], packing: Packing) -> dict[str, bytes]:
    """The parts with the picture encoded again, in its place, and its facts in the JSON."""
    image = next(extension for extension in parts if extension.lower() in IMAGE_KINDS)
    data, kind, picture = packing.encode(parts[image])
    if data == parts[image]:
        return parts
    name = next((extension for extension in parts if extension.lower() == "json"), "json")
    facts = json.loads(parts.get(name) or b"{}")
    if not isinstance(facts, dict):
        raise ValueError("its JSON is not an object")
    renamed = {kind if extension == image else extension: part for extension, part in parts.items()}
    return renamed | {kind: data, name: as_json(facts | picture)}


@lru_cache(maxsize=8)
def _open(path: str) -> Shard:
    return open_shard(path)


def read_shards(source: str | Path, allow_damaged: bool = False) -> tuple[list[Packable], Counter[str]]:
    """The whole samples of shards in their order, and the number left out by reason.

    A key that several shards have gets `_` and a hash of its shard's name in each of them. Raises UserError for
    a damaged shard unless it is allowed.
    """
    paths = expand(source)
    left_out: Counter[str] = Counter()
    samples: list[ShardSample] = []
    for path in paths:
        scan = scan_shard(path)
        if any(scan.problems[kind] for kind in DAMAGE) and not allow_damaged:
            raise UserError(f"{path} is damaged: {'; '.join(scan.examples)}; --allow-damaged packs its whole samples")
        left_out.update({kind: scan.problems[kind] for kind in (*DAMAGE, *LEFT_OUT, "no picture")})
        samples += _samples(path, {key.decode() for key in scan.keys})
    names = dict(zip(paths, relative_names(paths), strict=True))
    counts = Counter(sample.key for sample in samples)
    return [_rename(sample, names[sample.path]) if counts[sample.key] > 1 else sample for sample in samples], +left_out


def _rename(sample: ShardSample, shard: str) -> ShardSample:
    digest = hashlib.sha256(f"{shard}\0{sample.key}".encode()).hexdigest()[:8]
    return replace(sample, key=f"{sample.key}_{digest}", renamed=True)


def _samples(path: str, keys: set[str]) -> list[ShardSample]:
    """The samples of a shard with these keys, with every member."""
    parts: dict[str, list[tuple[str, int, int]]] = {}
    try:
        for member in members(_open(path)):
            names = split_name(member.name)
            if names is not None and names[0] in keys:
                extension = member.name[len(names[0]) + 1 :]
                parts.setdefault(names[0], []).append((extension, member.offset, member.size))
    except TornTar:  # its whole samples were counted before
        pass
    return [ShardSample(path, key, members=tuple(places)) for key, places in parts.items()]
