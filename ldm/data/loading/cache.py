"""Precomputes latents of shards of pictures: `python -m ldm.data.cache` and the knob `latents` of train.py.

One shard of pictures becomes one shard of latents, whole or not at all, so that processes share the work by shards and
an interrupted cache resumes.
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
from ldm.data.shards.index import load_manifest
from ldm.data.shards.picture import BadSample, Size
from ldm.data.shards.tar import LATENTS
from ldm.data.shards.write import write_shard
from ldm.errors import UserError

Encode = Callable[[Tensor], Tensor]
"""Mean and std [B, 2, C, h, w] of the normalised latents of images [B, 3, H, W] in [-1, 1]."""
EncodeTexts = Callable[[list[str]], dict[str, Tensor]]
"""The text encoders' states of captions: tensors [B, ...], by the names that training reads."""

POLL_s = 0.5


@dataclass(frozen=True)
class ShardPartition:
    """Which shards this process encodes, and how.

    rank, world   of the processes that share the shards; each encodes every world-th
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
class _Picture:
    """A sample to encode: its key, stored parts, variants, captions, and the (width, height) that buckets go by."""

    key: str
    parts: dict[str, bytes]
    variants: list[Sample]
    captions: list[str]
    indexed: tuple[int, int]


@dataclass
class _Chunk:
    """Samples of a shard, of one size; `bad` are (key, reason) of those left out, `last` ends the shard."""

    size: Size
    last: bool
    pictures: list[_Picture] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


class _Chunks(Dataset[_Chunk]):
    """The selected samples of some shards, size by size, decoded, in chunks that do not cross shards."""

    def __init__(self, fetcher: Fetcher, shards: Sequence[int], batch: int, record: LatentRecord) -> None:
        self.fetcher = fetcher
        self.record = record
        self.chunks: list[tuple[NDArray[np.int64], Size, bool]] = []
        for shard in shards:
            bounds = np.searchsorted(fetcher.manifest.shard, [shard, shard + 1]).tolist()
            numbers, buckets = fetcher.selection.within(*bounds)
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
        manifest = self.fetcher.manifest
        for index in indices.tolist():
            try:
                variants = [self.fetcher(index, variant, size) for variant in range(self.record.variants)]
                captions = self.fetcher.alternatives(index) if self.record.texts else []
            except BadSample as reason:
                chunk.bad.append((manifest.key(index), str(reason)))
                continue
            indexed = int(manifest.width[index]), int(manifest.height[index])
            parts = self.fetcher.parts(index)
            chunk.pictures.append(_Picture(manifest.key(index), parts, variants, captions, indexed))
        return chunk


@dataclass(frozen=True)
class Encoders:
    """What computes latents, and states of captions where the record has texts."""

    images: Encode
    texts: EncodeTexts | None = None


def write_latents(
    source: ShardSource,
    record: LatentRecord,
    encoders: Encoders,
    out: Path,
    partition: ShardPartition,
    selection: Selection | None = None,
    progress: bool = True,
) -> LatentSource:
    """Writes this process's part of the latents of `source` to the folder `out`, and waits for the others'.

    `selection` are the samples of each of the record's sizes; None: all, at the one size. Shards that are there already
    are kept. Returns the source to train from. UserError where `out` holds another cache, or too many pictures are bad.
    """
    latents = LatentSource(str(out), source.require_caption, captions=source.captions, weight=source.weight)
    if (out / RECORD).is_file() and _is_finished(out, record):
        return latents
    out.mkdir(parents=True, exist_ok=True)
    if partition.rank == 0 and not (out / RECORD).exists():
        write_record(out, record, None)
    manifest = source.manifest()
    paths = [out / f"{number:06d}.tar" for number in range(len(manifest.paths))]
    missing = [number for number in range(partition.rank, len(paths), partition.world) if not paths[number].exists()]
    started = time.monotonic()
    count = 0
    if missing:
        fetcher = source.fetcher(manifest, record.sizes, record.seed, decode=record.decode, selection=selection)
        chunks = _Chunks(fetcher, missing, partition.batch, record)
        count = _write_shards(chunks, [paths[number] for number in missing], encoders, partition, progress)
    if partition.rank == 0:
        _wait(lambda: all(path.exists() for path in paths))
        seconds = round(time.monotonic() - started, 1)
        write_record(out, record, _counts(out, paths, count, seconds))
    _wait(lambda: (out / RECORD).exists() and _is_finished(out, record))
    return latents


def _wait(ready: Callable[[], bool]) -> None:
    """Waits for the other processes; each ends with the launch that started it."""
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
    if changed := [name for name in wanted if facts.get(name) != wanted[name]]:
        changes = ", ".join(f"{name} {facts.get(name)}, wanted {wanted[name]}" for name in changed)
        raise UserError(f"{out} holds other latents ({changes}): give another folder")
    return bool(facts.get("finished"))


def _write_shards(
    chunks: _Chunks, paths: Sequence[Path], encoders: Encoders, partition: ShardPartition, progress: bool
) -> int:
    """Writes the chunks' shards to `paths`; returns how many pictures were encoded."""
    loader: DataLoader[Any] = DataLoader(chunks, batch_size=None, num_workers=partition.workers)
    bar: Any = tqdm(total=chunks.samples, unit="picture", desc="latents", disable=not progress, mininterval=1.0)
    bad: list[tuple[str, str]] = []
    count = 0
    stream = iter(loader)
    with bar:
        for path in paths:
            before = len(bad)
            count += write_shard(path, _samples(stream, encoders, bad, bar))
            if len(bad) > before:
                lines = [{"key": key, "reason": reason} for key, reason in bad[before:]]
                path.with_suffix(".left_out.json").write_text(json.dumps(lines, indent=1))
            seen = count + len(bad)
            if len(bad) > max(10, partition.max_bad * seen):
                listed = "\n".join(f"  {key}: {reason}" for key, reason in bad[:10])
                raise UserError(f"{len(bad)} of {seen} pictures cannot be used:\n{listed}\nfix these shards")
    return count


def _samples(
    stream: Iterator[_Chunk], encoders: Encoders, bad: list[tuple[str, str]], bar: Any
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The encoded samples of one shard, as the loader delivers them; the bad ones are added to `bad`."""
    for chunk in stream:
        bad += chunk.bad
        if chunk.pictures:
            pixels = np.stack([sample.pixels for picture in chunk.pictures for sample in picture.variants])
            moments = encoders.images(as_images(pixels)).to("cpu", torch.float16).numpy()
            moments = moments.reshape(len(chunk.pictures), -1, *moments.shape[1:])
            texts = _encode_texts([picture.captions for picture in chunk.pictures], encoders.texts)
            for picture, moment, states in zip(chunk.pictures, moments, texts, strict=True):
                yield picture.key, _members(picture, chunk.size, {MOMENTS: moment, **states})
        bar.update(len(chunk.pictures) + len(chunk.bad))
        if chunk.last:
            return


def _encode_texts(captions: list[list[str]], encode: EncodeTexts | None) -> list[dict[str, Any]]:
    """The states of each sample's captions: arrays [captions of the sample, ...] by name."""
    if encode is None:
        return [{} for _ in captions]
    ends = np.cumsum([len(texts) for texts in captions])[:-1]
    states = {name: t.to("cpu") for name, t in encode([text for texts in captions for text in texts]).items()}
    arrays = {name: (t.half() if t.is_floating_point() else t).numpy() for name, t in states.items()}
    parts = {name: np.split(array, ends) for name, array in arrays.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(captions))]


def _members(picture: _Picture, size: Size, arrays: dict[str, Any]) -> dict[str, bytes]:
    """The members of a sample by extension: latents, and the text and JSON that the picture had."""
    facts = json.loads(picture.parts["json"]) if "json" in picture.parts else {}
    original = picture.variants[0].original_size
    width, height = picture.indexed if all(picture.indexed) else original[::-1]
    facts |= {"width": width, "height": height}
    if picture.captions:
        facts[CAPTIONS] = picture.captions
    arrays |= {PLACES: np.array([size, original, *(sample.crop for sample in picture.variants)], np.int32)}
    text = {"txt": picture.parts["txt"]} if "txt" in picture.parts else {}
    return {LATENTS: pack(arrays), **text, "json": json.dumps(facts).encode()}


def _counts(out: Path, paths: Sequence[Path], count: int, seconds: float) -> dict[str, Any]:
    """The counts of a finished cache; the rate is this process's."""
    samples = len(load_manifest(str(out)))
    size = sum(path.stat().st_size for path in paths)
    left_out = [json.loads(path.read_text()) for path in sorted(out.glob("*.left_out.json"))]
    return {
        "samples": samples,
        "left_out": sum(map(len, left_out)),
        "bytes": size,
        "bytes_per_sample": round(size / max(1, samples)),
        "seconds": seconds,
        "pictures_per_second": round(count / seconds, 1) if seconds else None,
    }
