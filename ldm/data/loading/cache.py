"""Makes shards of latents beside shards of pictures: `python -m ldm.data.cache` and the knob `latents` of train.py.

One shard of pictures becomes one shard of latents, whole or not at all, so that the work is shared by shards and
goes on where it stopped.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.data.loading.fetch import Fetcher, Sample, as_images
from ldm.data.loading.latents import CAPTIONS, MOMENTS, PLACES, RECORD, LatentRecord, LatentSource, pack, write_record
from ldm.data.loading.shard_source import ShardSource
from ldm.data.order.selection import Selection
from ldm.data.shards.picture import BadSample
from ldm.data.shards.shards import write_shard
from ldm.data.shards.tar import LATENTS
from ldm.errors import UserError

Encode = Callable[[Tensor], Tensor]
"""Mean and std [B, 2, C, h, w] of the normalised latents of images [B, 3, H, W] in [-1, 1]."""
EncodeTexts = Callable[[list[str]], dict[str, Tensor]]
"""What the text encoders make of captions: tensors [B, ...], by names that training asks for."""

COMMAND = "ldm.commands.cache_latents"  # what builds the first stage that the command encodes with
POLL_s = 0.5


@dataclass(frozen=True)
class Work:
    """How much of the work this process does, and how.

    rank, world   of the processes that share the shards; each takes every world-th
    batch         pictures that are encoded at once
    workers       processes that decode pictures
    max_bad       it ends when more than this share of the pictures, and more than ten, cannot be used
    """

    rank: int = 0
    world: int = 1
    batch: int = 32
    workers: int = 0
    max_bad: float = 0.01


@dataclass
class _Chunk:
    """Samples of a shard, of one size: their keys, parts and pictures; `bad` are those left out."""

    size: tuple[int, int]
    last: bool
    keys: list[str] = field(default_factory=list)
    parts: list[dict[str, bytes]] = field(default_factory=list)
    variants: list[list[Sample]] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    indexed: list[tuple[int, int]] = field(default_factory=list)  # (width, height), what buckets are chosen by
    bad: list[tuple[str, str]] = field(default_factory=list)


class _Chunks(Dataset[_Chunk]):
    """The chosen samples of some shards, size by size, decoded, in chunks that do not cross shards."""

    def __init__(self, fetcher: Fetcher, shards: Sequence[int], batch: int, record: LatentRecord) -> None:
        self.fetcher = fetcher
        self.record = record
        self.chunks: list[tuple[NDArray[np.int64], tuple[int, int], bool]] = []
        for shard in shards:
            numbers, buckets = fetcher.chosen.within(
                *np.searchsorted(fetcher.manifest.shard, [shard, shard + 1]).tolist()
            )
            cuts = {0, len(numbers), *(np.flatnonzero(np.diff(buckets)) + 1).tolist()}
            for first, stop in pairwise(sorted(cuts)):
                size = record.sizes[buckets[first]]
                self.chunks += [(numbers[i : min(i + batch, stop)], size, False) for i in range(first, stop, batch)]
            if not len(numbers):  # an empty shard has one empty chunk
                self.chunks.append((numbers, record.sizes[0], True))
            self.chunks[-1] = (*self.chunks[-1][:2], True)

    @property
    def samples(self) -> int:
        return sum(len(indices) for indices, _, _ in self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> _Chunk:
        indices, size, last = self.chunks[number]
        chunk = _Chunk(size, last)
        for index in indices.tolist():
            manifest = self.fetcher.manifest
            key = manifest.key(index)
            try:
                made = [self.fetcher(index, variant, size) for variant in range(self.record.variants)]
                captions = self.fetcher.alternatives(index) if self.record.texts else []
            except BadSample as reason:
                chunk.bad.append((key, str(reason)))
                continue
            chunk.keys.append(key)
            chunk.parts.append(self.fetcher.parts(index))
            chunk.variants.append(made)
            chunk.captions.append(captions)
            chunk.indexed.append((int(manifest.width[index]), int(manifest.height[index])))
        return chunk


@dataclass(frozen=True)
class Encoders:
    """What makes latents, and states of captions where the record has texts."""

    images: Encode
    texts: EncodeTexts | None = None


def write_latents(
    source: ShardSource,
    record: LatentRecord,
    encoders: Encoders,
    out: Path,
    work: Work,
    chosen: Selection | None = None,
    progress: bool = True,
) -> LatentSource:
    """Writes this process's share of the latents of `source` to the folder `out`, and waits for the others'.

    `chosen` are the samples of each of the record's sizes; None: all, at the one size. What is there already is kept.
    Returns the source to train from. UserError where `out` holds another cache, or too many pictures are bad.
    """
    finished = LatentSource(str(out), source.require_caption, captions=source.captions, weight=source.weight)
    if (out / RECORD).is_file() and _is_finished(out, record):
        return finished
    out.mkdir(parents=True, exist_ok=True)
    if work.rank == 0 and not (out / RECORD).exists():
        write_record(out, record, None)
    manifest = source.manifest()
    paths = [out / f"{number:06d}.tar" for number in range(len(manifest.paths))]
    own = [number for number in range(work.rank, len(paths), work.world) if not paths[number].exists()]
    started = time.monotonic()
    made = 0
    if own:
        fetcher = source.fetcher(manifest, record.sizes, record.seed, decode=record.decode, chosen=chosen)
        made = _write_shards(fetcher, own, paths, record, encoders, work, progress)
    if work.rank == 0:
        _wait(lambda: all(path.exists() for path in paths))
        seconds = round(time.monotonic() - started, 1)
        write_record(out, record, _counts(out, paths, made, seconds))
    _wait(lambda: (out / RECORD).exists() and _is_finished(out, record))
    return finished


def _wait(ready: Callable[[], bool]) -> None:
    """For the other processes; each ends with the launch that started it."""
    while not ready():
        time.sleep(POLL_s)


def _is_finished(out: Path, record: LatentRecord) -> bool:
    """Whether the cache in `out` is complete; UserError where it is another one."""
    facts = json.loads((out / RECORD).read_text())
    if facts.get("first_stage") != record.first_stage:
        raise UserError(
            f"{out} holds latents of the first stage {facts.get('first_stage')}, this one is {record.first_stage}: "
            "give another folder, or delete that one"
        )
    wanted: dict[str, Any] = json.loads(json.dumps(asdict(record)))
    if other := [name for name in wanted if facts.get(name) != wanted[name]]:
        told = ", ".join(f"{name} {facts.get(name)}, wanted {wanted[name]}" for name in other)
        raise UserError(f"{out} holds other latents ({told}): give another folder")
    return bool(facts.get("finished"))


def _write_shards(
    fetcher: Fetcher,
    own: Sequence[int],
    paths: Sequence[Path],
    record: LatentRecord,
    encoders: Encoders,
    work: Work,
    progress: bool,
) -> int:
    """Writes the shards `own`; returns how many pictures were encoded."""
    chunks = _Chunks(fetcher, own, work.batch, record)
    loader: DataLoader[Any] = DataLoader(chunks, batch_size=None, num_workers=work.workers)
    bar: Any = tqdm(total=chunks.samples, unit="picture", desc="latents", disable=not progress, mininterval=1.0)
    left_out: list[tuple[str, str]] = []
    made = 0
    stream = iter(loader)
    with bar:
        for number in own:
            before = len(left_out)
            made += write_shard(paths[number], _samples(stream, record, encoders, left_out, bar))
            if len(left_out) > before:
                told = [{"key": key, "reason": reason} for key, reason in left_out[before:]]
                paths[number].with_suffix(".left_out.json").write_text(json.dumps(told, indent=1))
            seen = made + len(left_out)
            if len(left_out) > max(10, work.max_bad * seen):
                listed = "\n".join(f"  {key}: {reason}" for key, reason in left_out[:10])
                raise UserError(f"{len(left_out)} of {seen} pictures cannot be used:\n{listed}\nmend these shards")
    return made


def _samples(
    stream: Iterator[_Chunk], record: LatentRecord, encoders: Encoders, left_out: list[tuple[str, str]], bar: Any
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of one shard as they come from the loader, encoded."""
    for chunk in stream:
        left_out += chunk.bad
        if chunk.keys:
            flat = np.stack([sample.pixels for variants in chunk.variants for sample in variants])
            moments = encoders.images(as_images(flat)).to("cpu", torch.float16).numpy()
            moments = moments.reshape(len(chunk.keys), record.variants, *moments.shape[1:])
            texts = _encode_texts(chunk, encoders.texts)
            for i, key in enumerate(chunk.keys):
                arrays = {MOMENTS: moments[i], **texts[i]}
                yield key, _members(chunk, i, arrays)
        bar.update(len(chunk.keys) + len(chunk.bad))
        if chunk.last:
            return


def _encode_texts(chunk: _Chunk, encode: EncodeTexts | None) -> list[dict[str, Any]]:
    """What each sample's captions are encoded to: arrays [captions of the sample, ...] by name."""
    if encode is None:
        return [{} for _ in chunk.keys]
    ends = np.cumsum([len(captions) for captions in chunk.captions])[:-1]
    made = encode([caption for captions in chunk.captions for caption in captions])
    half = {name: states.to("cpu") for name, states in made.items()}
    arrays = {name: (t.half() if t.is_floating_point() else t).numpy() for name, t in half.items()}
    parts = {name: np.split(array, ends) for name, array in arrays.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(chunk.keys))]


def _members(chunk: _Chunk, number: int, arrays: dict[str, Any]) -> dict[str, bytes]:
    """The members of a sample by extension: latents, and the text and JSON that the picture had."""
    parts, variants = chunk.parts[number], chunk.variants[number]
    facts = json.loads(parts["json"]) if "json" in parts else {}
    original = variants[0].original_size
    width, height = chunk.indexed[number] if all(chunk.indexed[number]) else original[::-1]
    facts |= {"width": width, "height": height}
    if chunk.captions[number]:
        facts[CAPTIONS] = chunk.captions[number]
    arrays |= {PLACES: np.array([chunk.size, original, *(sample.crop for sample in variants)], np.int32)}
    text = {"txt": parts["txt"]} if "txt" in parts else {}
    return {LATENTS: pack(arrays), **text, "json": json.dumps(facts).encode()}


def _counts(out: Path, paths: Sequence[Path], made: int, seconds: float) -> dict[str, Any]:
    """What a finished cache amounts to; the rate is this process's."""
    manifest = LatentSource(str(out)).open()
    size = sum(path.stat().st_size for path in paths)
    left_out = [json.loads(path.read_text()) for path in sorted(out.glob("*.left_out.json"))]
    return {
        "samples": len(manifest),
        "left_out": sum(map(len, left_out)),
        "bytes": size,
        "bytes_per_sample": round(size / max(1, len(manifest))),
        "seconds": seconds,
        "pictures_per_second": round(made / seconds, 1) if seconds else None,
    }
