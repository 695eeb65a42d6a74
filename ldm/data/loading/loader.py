"""The batches of a run as a sized map from micro-step to batch, so that a loader can start anywhere."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from ldm.data.loading.batch import Batch
from ldm.data.loading.fetch import Fetcher, Sample
from ldm.data.order.plan import Plan, micro_batch
from ldm.randomness import key, keys

AHEAD = 2  # batches that threads decode in advance

Visit = tuple[int, int, int, tuple[int, int] | None, range]
"""Source, place, epoch, (height, width) where there are several, and the places of the same source and bucket."""


class Fetched(NamedTuple):
    """A sample, its arrays for the batch, and (number, reason) of each bad sample that it replaces.

    Numbers count through the manifests of all sources, one after the other.
    """

    sample: Sample
    number: int
    arrays: dict[str, NDArray[Any]]
    bad: Sequence[tuple[int, str]]


def make_batch(
    fetched: Sequence[Fetched], rng_keys: Tensor, step: int, positions: Sequence[int], global_batch: int
) -> Batch:
    """The batch of B fetched samples."""
    samples = [each.sample for each in fetched]
    texts = {name: torch.from_numpy(np.stack([sample.texts[name] for sample in samples])) for name in samples[0].texts}
    return Batch(
        **{name: torch.from_numpy(np.stack([each.arrays[name] for each in fetched])) for name in fetched[0].arrays},
        fields={"caption": [sample.caption for sample in samples], **texts},
        samples=torch.tensor([each.number for each in fetched], dtype=torch.int64),
        rng_keys=rng_keys,
        step=step,
        original_size=torch.tensor([sample.original_size for sample in samples], dtype=torch.int64),
        crop=torch.tensor([sample.crop for sample in samples], dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        global_batch=global_batch,
        bad=[entry for each in fetched for entry in each.bad],
    )


class Threads:
    """Threads of a process, started when first used; none in a copy or a child of it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def submit(self, function: Callable[..., Fetched], *arguments: Any) -> "Future[Fetched]":
        """Runs the function in a thread."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(self.count, "decode")
        return self._pool[1].submit(function, *arguments)

    def __reduce__(self) -> tuple[type["Threads"], tuple[int]]:
        return Threads, (self.count,)


class TrainBatches(Dataset[Batch]):
    """Item i is the batch of a rank's micro-step i: part i % accumulation of step i // accumulation.

    fetcher   of the samples, or one of each of the plan's sources; the plan counts their selections
    sizes     (height, width) of each of the plan's buckets; None: the size of the fetchers' views
    threads   of each process that fetch samples, and start on the next batches; 0: the process itself does

    A batch's samples are numbered through the sources' manifests, one after the other.
    """

    def __init__(
        self,
        fetcher: Fetcher | Sequence[Fetcher],
        plan: Plan,
        total_steps: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        sizes: Sequence[tuple[int, int]] | None = None,
        threads: int = 0,
    ) -> None:
        self.fetchers = [fetcher] if isinstance(fetcher, Fetcher) else list(fetcher)
        self.plan = plan
        self.total_steps = total_steps
        self.sizes = sizes
        self.threads = Threads(threads)
        micro = micro_batch(plan.global_batch, world, accumulation)
        self.positions = plan.rank_slice(rank, world, micro, accumulation)  # [accumulation, micro]
        counts = plan.samples.sum(1)
        self._first = np.cumsum(counts) - counts  # place of each source's first sample
        self._before = np.cumsum([0, *(len(each.manifest) for each in self.fetchers)]).tolist()
        self._pending: dict[int, list[Future[Fetched]]] = {}

    def __len__(self) -> int:
        return self.total_steps * len(self.positions)

    def __getitem__(self, micro_step: int) -> Batch:
        if self.threads.count:
            fetched = [future.result() for future in self._ahead(micro_step)]
        else:
            fetched = [self._fetch(*visit) for visit in self._visits(micro_step)]
        step, part = divmod(micro_step, len(self.positions))
        positions = self.positions[part]
        rng_keys = keys(self.plan.seed, "train", step, count=len(positions), start=int(positions[0]))
        return make_batch(fetched, rng_keys, step, positions.tolist(), self.plan.global_batch)

    def _ahead(self, micro_step: int) -> "list[Future[Fetched]]":
        """The samples of a micro-step from the threads, which start on those of the next ones."""
        worker = get_worker_info()
        wanted = range(micro_step, len(self), worker.num_workers if worker else 1)[: AHEAD + 1]
        for stale in self._pending.keys() - set(wanted):
            for future in self._pending.pop(stale):
                future.cancel()
        for item in wanted:
            if item not in self._pending:
                self._pending[item] = [self.threads.submit(self._fetch, *visit) for visit in self._visits(item)]
        return self._pending.pop(micro_step)

    def _visits(self, micro_step: int) -> "list[Visit]":
        step, part = divmod(micro_step, len(self.positions))
        places, epochs = self.plan.at(step, self.positions[part])
        bucket = self.plan.bucket(step)
        size = self.sizes[bucket] if self.sizes else None
        lanes = [self.plan.lane(source, bucket) for source in range(len(self.fetchers))]
        sources = np.searchsorted(self._first, places, side="right") - 1
        triples = zip(sources.tolist(), places.tolist(), epochs.tolist(), strict=True)
        return [(source, place, epoch, size, lanes[source]) for source, place, epoch in triples]

    def _fetch(self, source: int, place: int, epoch: int, size: tuple[int, int] | None, lane: range) -> Fetched:
        first, fetcher, before = int(self._first[source]), self.fetchers[source], self._before[source]
        places = range(lane.start - first, lane.stop - first)
        sample, bad = fetcher.fetch_or_substitute(fetcher.selection[place - first], epoch, size, places)
        numbered = [(index + before, reason) for index, reason in bad]
        return Fetched(sample, sample.index + before, sample.arrays(), numbered)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pending": {}}


class ValBatches(Dataset[Batch]):
    """The first `samples` of a fetcher's selection, in their order, in batches; a rank takes every world-th.

    The same in every run: keys are ("val", place). `samples` is rounded down to a multiple of the ranks, so
    that all have as many batches.
    """

    def __init__(self, fetcher: Fetcher, samples: int, batch: int, rank: int = 0, world: int = 1) -> None:
        samples = min(samples, len(fetcher.selection))
        self.fetcher = fetcher
        self.batch = batch
        self.samples = samples - samples % world
        self.indices = range(rank, self.samples, world)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __getitem__(self, number: int) -> Batch:
        places = list(self.indices[number * self.batch : (number + 1) * self.batch])
        rng_keys = torch.tensor([key("val", place) for place in places], dtype=torch.int64)
        pairs = [self.fetcher.fetch_or_substitute(self.fetcher.selection[place]) for place in places]
        fetched = [Fetched(sample, sample.index, sample.arrays(), bad) for sample, bad in pairs]
        return make_batch(fetched, rng_keys, number, places, self.samples)


class StepSampler(DistributedSampler[int]):
    """The items from `start` to the end; its length counts those before `start` too.

    Lightning counts a resumed epoch's batches from the beginning, so the length is the whole run's. It is a
    DistributedSampler by type alone: Lightning wraps any other sampler in its own, which would
    divide among the ranks what the plan has divided already.
    """

    def __init__(self, total: int, start: int = 0) -> None:
        self.total = total
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the order is the plan's."""


def _identity(batch: Batch) -> Batch:
    return batch


class StepLoader(DataLoader[Batch]):
    """A loader of ready batches. It resumes by its start alone; its empty state says so to Lightning.

    `waited_s` adds up the seconds that its reader has waited for batches.
    """

    def __init__(self, batches: TrainBatches | ValBatches, start: int = 0, workers: int = 0) -> None:
        super().__init__(
            batches,
            batch_size=None,
            sampler=StepSampler(len(batches), start),
            num_workers=workers,
            collate_fn=_identity,  # type: ignore[arg-type]
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        start = time.perf_counter()
        for batch in super().__iter__():
            self.waited_s += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
