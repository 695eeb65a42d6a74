"""Training data that cannot be indexed (`pipe:` commands, streams) through webdataset's own pipeline, resampled.

A rank's worker draws shards with replacement, reads them in order and mixes the samples in a buffer. The samples
depend on (seed, rank, worker, the step at which the run started): such a run resumes, but not with the very next
sample. Where shards can be indexed, `ldm.data.loading.datamodule` is better in every respect.
"""

import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
from braceexpand import braceexpand
from torch.utils.data import get_worker_info
from webdataset.filters import shuffle
from webdataset.gopen import gopen
from webdataset.shardlists import ResampledShards
from webdataset.tariterators import group_by_keys, tar_file_iterator

from ldm.data.loading.batch import Batch
from ldm.data.loading.caption_choice import json_caption
from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.loading.fetch import Sample, View
from ldm.data.loading.loader import Fetched, TrainBatches, make_batch
from ldm.data.loading.quarantine import Skipped
from ldm.data.loading.shard_source import ShardSource
from ldm.data.order.plan import micro_batch
from ldm.data.shards.picture import BadSample, decode
from ldm.data.shards.remote import Remote
from ldm.data.shards.shards import Shard, Shards, expand, open_shard
from ldm.data.shards.tar import IMAGE_KINDS, MAX_text_bytes
from ldm.errors import UserError
from ldm.randomness import key, keys

log = logging.getLogger(__name__)

BUFFER_bytes = 4 << 20
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
        names = [entries] if isinstance(entries, str) else [str(entry) for entry in entries]
        pipes = [command for name in names if name.startswith("pipe:") for command in braceexpand(name)]
        others = [name for name in names if not name.startswith("pipe:")]
        return [*pipes, *(expand(others) if others or not pipes else [])]


class _Reader(io.RawIOBase):
    """A shard as a file that is read in order."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.offset = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.shard.read(self.offset, len(buffer))
        buffer[: len(data)] = data
        self.offset += len(data)
        return len(data)

    def close(self) -> None:
        self.shard.close()
        super().close()


def _open(path: str, remote: Remote | None) -> IO[bytes]:
    """A shard to be read from its beginning; a command is run by webdataset, in a shell."""
    if path.startswith("pipe:"):
        return cast(IO[bytes], gopen(path))
    return io.BufferedReader(_Reader(open_shard(path, remote)), BUFFER_bytes)


def stream(
    source: StreamSource, paths: Sequence[str], seed: int, bad: list[tuple[int, str]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Endless (place of the shard in `paths`, webdataset sample), without a torn shard's last sample.

    Torn shards are added to `bad`. Raises UserError where several in a row have no sample.
    """
    places = {path: place for place, path in enumerate(paths)}

    def samples() -> Iterator[tuple[int, dict[str, Any]]]:
        empty = 0
        for shard in ResampledShards(list(paths), seed=seed, worker_seed=lambda: 0, deterministic=True):
            url, count, cause = shard["url"], 0, "it has no samples"
            try:
                with closing(_open(url, source.remote)) as file:
                    for sample in group_by_keys(dict(member, __url__=url) for member in tar_file_iterator(file)):
                        count += 1
                        yield places[url], sample
            except UserError:
                raise
            except Exception as error:  # tarfile, the command and webdataset each have their own
                cause = f"{type(error).__name__}: {error}"
                bad.append((places[url], "torn shard"))
            empty = 0 if count else empty + 1
            if empty == TRIES:
                raise UserError(f"{TRIES} shards in a row gave no sample, the last is {url}: {cause}")

    mixed: Iterator[tuple[int, dict[str, Any]]] = shuffle(source.buffer, source.buffer, rng=random.Random(seed))(
        samples()
    )
    return mixed


def picture_of(sample: Mapping[str, Any]) -> bytes:
    """The encoded picture of a webdataset sample. Raises BadSample where it has none."""
    for kind in IMAGE_KINDS:
        if kind in sample:
            return cast(bytes, sample[kind])
    raise BadSample("no picture")


def caption_of(sample: Mapping[str, Any], required: bool) -> str:
    """The caption in a sample's text, else in its JSON. Raises BadSample where it needs one and has none."""
    text, description = sample.get("txt", b""), sample.get("json", b"")
    if max(len(text), len(description)) > MAX_text_bytes:
        raise BadSample("too many bytes")
    caption = str(text, "utf-8", "replace").strip() or json_caption(description)
    if not caption and required:
        raise BadSample("no caption")
    return caption


class StreamBatches(TrainBatches):
    """Item i is the batch of a rank's micro-step i, of the samples that come next in this process.

    `start` is the step at which this run began; with seed, rank and worker it selects the stream.
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
        fetched = [self._next(step, position) for position in positions]
        rng_keys = keys(self.seed, "train", step, count=len(positions), start=positions[0])
        bad, self._bad[:] = list(self._bad), []
        return make_batch(fetched, rng_keys, step, positions, self.global_batch)._replace(bad=bad)

    def _next(self, step: int, position: int) -> Fetched:
        """The next sample that can be used, under a number that is a hash of its key."""
        if self._samples is None:
            worker = get_worker_info()
            address = (self.seed, "stream", self.rank, worker.id if worker else -1, self.start)
            self._samples = stream(self.source, self.paths, key(*address) & INDEX, self._bad)
        before = len(self._bad)
        for place, sample in self._samples:
            try:
                caption = caption_of(sample, self.source.require_caption)
                covering, original = decode(picture_of(sample), self.view.size)
            except BadSample as reason:
                self._bad.append((place, str(reason)))
                if len(self._bad) - before >= TRIES:
                    raise UserError(
                        f"{TRIES} samples in a row cannot be used, the last in {self.paths[place]}"
                    ) from reason
                continue
            pixels, crop = self.view.crop(covering, self.view.size, self.seed, step, position)
            number = key(self.paths[place], sample["__key__"]) & INDEX
            cropped = Sample(pixels, caption, number, original, crop)
            return Fetched(cropped, number, cropped.arrays(), ())
        raise AssertionError("the stream is endless")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_samples": None, "_bad": []}


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
        steps = (size, global_batch, total_steps, seed, workers, accumulation)
        super().__init__(None, val, *steps, val_samples=val_samples, val_batch=val_batch, max_bad=max_bad)
        self.stream = train

    def prepare_data(self) -> None:
        """Indexes the validation shards."""
        self.index()

    def setup(self, stage: str | None = None) -> None:
        """Opens the validation manifest and resets the counts."""
        log.warning(
            "training data is a stream: shards are drawn at random, so a resumed run continues with other samples than "
            "an uninterrupted one, and some samples come more often than others. Index the shards if you can"
        )
        self.setup_val()
        self.quarantine = Skipped(self.stream.paths(), self.max_bad)

    def train_batches(self, rank: int = 0, world: int = 1, accumulation: int = 1) -> StreamBatches:
        """The batches of a rank, item i for micro-step i."""
        view = View.of(self.size, self.stream.random_crop, self.stream.flip)
        at = (rank, world, accumulation, self.steps_done)
        return StreamBatches(self.stream, view, self.seed, self.global_batch, self.total_steps, *at)

    def _order(self) -> dict[str, Any]:
        """The settings that a resumed run has to share with the one before."""
        return {"global_batch": self.global_batch}
