"""Training data that cannot be indexed (`pipe:` commands, streams) through webdataset's own pipeline, resampled.

A rank's worker draws shards with replacement, reads them in order and mixes the samples in a buffer. What comes
depends on (seed, rank, worker, the step at which the run started): such a run goes on after a stop, but not with the
very next sample. Where shards can be indexed, `ldm.data.loading.datamodule` does better in every respect.
"""

import io
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
import torch
from braceexpand import braceexpand
from torch.utils.data import get_worker_info
from webdataset.filters import shuffle
from webdataset.gopen import gopen
from webdataset.shardlists import ResampledShards
from webdataset.tariterators import group_by_keys, tar_file_iterator

from ldm.data.loading.batch import Batch
from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.loading.fetch import View, as_images
from ldm.data.loading.loader import TrainBatches
from ldm.data.loading.quarantine import Quarantine
from ldm.data.loading.shard_source import ShardSource, Source
from ldm.data.order.plan import micro_batch
from ldm.data.shards.index import index_shards
from ldm.data.shards.picture import BadSample, Pixels, decode
from ldm.data.shards.remote import Remote
from ldm.data.shards.shards import Shard, Shards, expand, open_shard
from ldm.data.shards.tar import IMAGE_KINDS, MAX_text_bytes
from ldm.errors import UserError
from ldm.randomness import key, keys

log = logging.getLogger(__name__)

AHEAD_bytes = 4 << 20
TRIES = 10  # shards in a row without a sample, samples in a row that cannot be used
INDEX = (1 << 63) - 1


@dataclass(frozen=True)
class StreamSource:
    """Shards that are read from end to end.

    shards           as elsewhere, or `pipe:` commands that write a tar file, with braces for many
    buffer           samples, as they are stored, that a worker mixes
    random_crop      crop anywhere, not at the centre
    flip             mirror half of the samples
    require_caption  a sample without caption is bad; false gives it the empty caption
    remote           how shards behind a URL are read
    """

    shards: Shards
    buffer: int = 500
    random_crop: bool = False
    flip: bool = False
    require_caption: bool = True
    remote: Remote | None = None

    def paths(self) -> list[str]:
        """The shards' paths, URLs and commands."""
        entries = [self.shards] if not isinstance(self.shards, Sequence | str) else self.shards
        listed = [entries] if isinstance(entries, str) else [str(entry) for entry in entries]
        pipes = [command for entry in listed if entry.startswith("pipe:") for command in braceexpand(entry)]
        others = [entry for entry in listed if not entry.startswith("pipe:")]
        return [*pipes, *(expand(others) if others or not pipes else [])]


class _File(io.RawIOBase):
    """A shard as a file that is read in order."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.place = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.shard.read(self.place, len(buffer))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def close(self) -> None:
        self.shard.close()
        super().close()


def _opened(path: str, remote: Remote | None) -> IO[bytes]:
    """A shard to be read from its beginning; a command is run by webdataset, in a shell."""
    if path.startswith("pipe:"):
        return cast(IO[bytes], gopen(path))
    return io.BufferedReader(_File(open_shard(path, remote)), AHEAD_bytes)


def stream(
    source: StreamSource, paths: Sequence[str], seed: int, bad: list[tuple[int, str]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Endless (place of the shard in `paths`, webdataset sample); a torn shard's last sample is not among them.

    Torn shards are noted in `bad`. Raises UserError where several in a row give nothing.
    """
    drawn = ResampledShards(list(paths), seed=seed, worker_seed=lambda: 0, deterministic=True)
    places = {path: place for place, path in enumerate(paths)}

    def samples() -> Iterator[tuple[int, dict[str, Any]]]:
        empty = 0
        for shard in drawn:
            place, found, told = places[shard["url"]], 0, "it has no samples"
            try:
                with closing(_opened(shard["url"], source.remote)) as file:
                    members = (dict(member, __url__=shard["url"]) for member in tar_file_iterator(file))
                    for sample in group_by_keys(members):
                        found += 1
                        yield place, sample
            except UserError:
                raise
            except Exception as error:  # tarfile, the command and webdataset each have their own
                told = f"{type(error).__name__}: {error}"
                bad.append((place, "torn shard"))
            empty = 0 if found else empty + 1
            if empty == TRIES:
                raise UserError(f"{TRIES} shards in a row gave no sample, the last is {shard['url']}: {told}")

    mixed: Iterator[tuple[int, dict[str, Any]]] = shuffle(source.buffer, source.buffer, rng=random.Random(seed))(
        samples()
    )
    return mixed


def caption_of(sample: Mapping[str, Any], required: bool) -> str:
    """The caption in a sample's text, else in its JSON. Raises BadSample where it needs one and has none."""
    text, described = sample.get("txt", b""), sample.get("json", b"")
    if max(len(text), len(described)) > MAX_text_bytes:
        raise BadSample("too many bytes")
    caption = str(text, "utf-8", "replace").strip()
    if not caption and described:
        try:
            facts = json.loads(described)
        except ValueError:
            facts = None
        found = facts.get("caption") if isinstance(facts, dict) else None
        caption = found.strip() if isinstance(found, str) else ""
    if not caption and required:
        raise BadSample("no caption")
    return caption


def cropped(pixels: Pixels, view: View, draw: int) -> tuple[Pixels, tuple[int, int]]:
    """(pixels of the view's size, (top, left)) of a picture that covers it; `draw` is 64 random bits."""
    spare = (pixels.shape[0] - view.size[0], pixels.shape[1] - view.size[1])
    top, left = spare[0] // 2, spare[1] // 2
    if view.random_crop:
        top, left = (draw & 0x7FFFFFFF) % (spare[0] + 1), (draw >> 31 & 0x7FFFFFFF) % (spare[1] + 1)
    pixels = pixels[top : top + view.size[0], left : left + view.size[1]]
    return pixels[:, ::-1] if view.flip and draw >> 62 & 1 else pixels, (top, left)


class StreamBatches(TrainBatches):
    """Item i is the batch of a rank's micro-step i, made of whatever samples come next in this process.

    `start` is the step at which this run began; with seed, rank and worker it chooses the stream.
    """

    def __init__(
        self,
        source: StreamSource,
        view: View,
        seed: int,
        global_batch: int,
        total_steps: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        start: int = 0,
    ) -> None:
        self.source, self.view, self.seed = source, view, seed
        self.paths = source.paths()
        self.global_batch, self.total_steps = global_batch, total_steps
        self.rank, self.start = rank, start
        micro = micro_batch(global_batch, world, accumulation)
        self.positions = np.arange(global_batch).reshape(accumulation, world, micro)[:, rank]
        self._bad: list[tuple[int, str]] = []
        self._samples: Iterator[tuple[int, dict[str, Any]]] | None = None

    def __getitem__(self, micro_step: int) -> Batch:
        step, part = divmod(micro_step, len(self.positions))
        positions = self.positions[part].tolist()
        taken = [self._next(step, position) for position in positions]
        bad, self._bad[:] = list(self._bad), []
        images, captions, originals, crops, samples = zip(*taken, strict=True)
        return Batch(
            images=as_images(np.stack(images)),
            fields={"caption": list(captions)},
            samples=torch.tensor(samples, dtype=torch.int64),
            rng_keys=keys(self.seed, "train", step, count=len(positions), start=positions[0]),
            step=step,
            original_size=torch.tensor(originals, dtype=torch.int64),
            crop=torch.tensor(crops, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            global_batch=self.global_batch,
            bad=bad,
        )

    def _next(self, step: int, position: int) -> tuple[Pixels, str, tuple[int, int], tuple[int, int], int]:
        """The next sample that can be used: pixels, caption, original size, crop, a number made of its key."""
        if self._samples is None:
            worker = get_worker_info()
            address = (self.seed, "stream", self.rank, worker.id if worker else -1, self.start)
            self._samples = stream(self.source, self.paths, key(*address) & INDEX, self._bad)
        before = len(self._bad)
        for place, sample in self._samples:
            try:
                caption = caption_of(sample, self.source.require_caption)
                pixels, original = decode(_picture(sample), self.view.size)
            except BadSample as reason:
                self._bad.append((place, str(reason)))
                if len(self._bad) - before >= TRIES:
                    raise UserError(
                        f"{TRIES} samples in a row cannot be used, the last in {self.paths[place]}"
                    ) from reason
                continue
            pixels, crop = cropped(pixels, self.view, key(self.seed, "stream crop", step, position) & INDEX)
            return pixels, caption, original, crop, key(self.paths[place], sample["__key__"]) & INDEX
        raise AssertionError("the stream is endless")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_samples": None, "_bad": []}


def _picture(sample: Mapping[str, Any]) -> bytes:
    for kind in IMAGE_KINDS:
        if kind in sample:
            return cast(bytes, sample[kind])
    raise BadSample("no picture")


class Skipped:
    """Counts what a stream left out. Raises UserError above `limit` of the samples, and above `minimum`."""

    def __init__(self, paths: Sequence[str], limit: float = 0.01, minimum: int = 10) -> None:
        self.paths, self.limit, self.minimum = paths, limit, minimum
        self.seen = 0
        self.counts: Counter[tuple[str, str]] = Counter()  # (shard, reason)

    def add(self, batch: Batch) -> None:
        """Takes a batch into account."""
        self.seen += len(batch.samples) + len(batch.bad)
        self.counts.update((self.paths[place], reason) for place, reason in batch.bad)
        bad = self.counts.total()
        if batch.bad and bad > max(self.minimum, self.limit * self.seen):
            listed = "\n".join(f"  {path}: {count} x {why}" for (path, why), count in self.counts.most_common(10))
            raise UserError(
                f"{bad} of {self.seen} samples could not be used, more than {self.limit:.1%}:\n{listed}\n"
                "mend or leave out these shards, or allow more with max_bad"
            )


class StreamDataModule(ShardDataModule):
    """Batches for `total_steps` steps from a stream; validation comes from indexed shards. See ShardDataModule."""

    def __init__(
        self,
        train: StreamSource,
        val: ShardSource,
        size: int | Sequence[int],
        global_batch: int,
        total_steps: int,
        seed: int = 0,
        workers: int = 0,
        accumulation: int | None = None,
        val_samples: int = 512,
        val_batch: int | None = None,
        max_bad: float = 0.01,
    ) -> None:
        super().__init__(
            cast(Source, train),  # never indexed: whatever reads it is overridden here
            val,
            size,
            global_batch,
            total_steps,
            seed,
            workers,
            accumulation,
            val_samples=val_samples,
            val_batch=val_batch,
            max_bad=max_bad,
        )
        self.streamed, self.held_out = train, val

    def prepare_data(self) -> None:
        """Indexes the validation shards."""
        index_shards(self.held_out.shards, self.held_out.index, remote=self.held_out.remote)

    def setup(self, stage: str | None = None) -> None:
        """Opens the validation manifest and counts from nothing."""
        log.warning(
            "training data is a stream: shards are drawn at random, and a resumed run goes on with other samples than "
            "the ones that would have come, and some come more often than others. Index the shards if you can"
        )
        manifest = self.held_out.manifest()
        self.val_fetcher = self._fetcher(self.held_out, manifest, *self.select_val(manifest))
        self.val_quarantine = Quarantine(manifest, self.max_bad)
        self.skipped = Skipped(self.streamed.paths(), self.max_bad)

    def train_batches(self, rank: int = 0, world: int = 1, accumulation: int = 1) -> StreamBatches:
        """The batches of a rank, item i for micro-step i."""
        view = View.of(self.size, self.streamed.random_crop, self.streamed.flip)
        at = (rank, world, accumulation, self.steps_done)
        return StreamBatches(self.streamed, view, self.seed, self.global_batch, self.total_steps, *at)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch; what was left out is counted. Raises UserError when it is too much."""
        training = self.trainer is None or self.trainer.training
        (self.skipped if training else self.val_quarantine).add(batch)
        return batch

    def _order(self) -> dict[str, Any]:
        """What a resumed run has to share with the one before."""
        return {"global_batch": self.global_batch}
