"""The batches of a run as a sized map from micro-step to batch, so that a loader can start anywhere."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from ldm.data.batch import Batch
from ldm.data.fetch import Fetcher, Sample
from ldm.data.plan import Plan, micro_batch
from ldm.randomness import key, keys


def make_batch(
    fetcher: Fetcher,
    indices: list[int],
    epochs: list[int],
    keys: Tensor,
    step: int,
    positions: Sequence[int],
    global_batch: int,
) -> Batch:
    """The batch of the samples at `indices` [B] in `epochs` [B], bad ones replaced."""
    found = [fetcher.good(index, epoch) for index, epoch in zip(indices, epochs, strict=True)]
    samples = [sample for sample, _ in found]
    return Batch(
        **fetcher.pictures(samples),
        fields={"caption": [sample.caption for sample in samples], **_texts(samples)},
        samples=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        keys=keys,
        step=step,
        original_size=torch.tensor([sample.original_size for sample in samples], dtype=torch.int64),
        crop=torch.tensor([sample.crop for sample in samples], dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        global_batch=global_batch,
        bad=[entry for _, bad in found for entry in bad],
    )


def _texts(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What was made of the captions beforehand, by name [B, ...]."""
    names = samples[0].texts
    return {name: torch.from_numpy(np.stack([sample.texts[name] for sample in samples])) for name in names}


class TrainBatches(Dataset[Batch]):
    """Item i is the batch of a rank's micro-step i: part i % accumulation of step i // accumulation."""

    def __init__(
        self,
        fetcher: Fetcher,
        plan: Plan,
        total_steps: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
    ) -> None:
        self.fetcher = fetcher
        self.plan = plan
        self.total_steps = total_steps
        micro = micro_batch(plan.global_batch, world, accumulation)
        self.positions = plan.rank_slice(rank, world, micro, accumulation)  # [accumulation, micro]

    def __len__(self) -> int:
        return self.total_steps * len(self.positions)

    def __getitem__(self, micro_step: int) -> Batch:
        step, part = divmod(micro_step, len(self.positions))
        positions = self.positions[part]
        indices, epochs = self.plan.at(step, positions)
        addresses = keys(self.plan.seed, "train", step, count=len(positions), start=int(positions[0]))
        at = (positions.tolist(), self.plan.global_batch)
        return make_batch(self.fetcher, indices.tolist(), epochs.tolist(), addresses, step, *at)


class ValBatches(Dataset[Batch]):
    """The first `samples` of a manifest in their order, in batches; a rank takes every world-th sample.

    The same in every run: keys are ("val", index). `samples` is rounded down to a multiple of the ranks, so
    that all have as many batches.
    """

    def __init__(self, fetcher: Fetcher, samples: int, batch: int, rank: int = 0, world: int = 1) -> None:
        self.fetcher = fetcher
        self.batch = batch
        self.samples = samples - samples % world
        self.indices = range(rank, self.samples, world)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __getitem__(self, number: int) -> Batch:
        indices = list(self.indices[number * self.batch : (number + 1) * self.batch])
        addresses = torch.tensor([key("val", index) for index in indices], dtype=torch.int64)
        return make_batch(self.fetcher, indices, [0] * len(indices), addresses, number, indices, self.samples)


class StepSampler(DistributedSampler[int]):
    """The items from `start` to the end; its length counts those before `start` too.

    Lightning counts a resumed epoch's batches from the beginning, so the length is the whole run's. It is a
    DistributedSampler by type alone: Lightning wraps any other sampler in one of its own, which would share
    out what the plan has shared out already.
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


class StepLoader(DataLoader[Batch]):
    """A loader of ready batches. It resumes by its start alone, which its empty state tells Lightning.

    `waited_s` adds up the seconds that whoever reads it has waited for batches.
    """

    def __init__(self, batches: TrainBatches | ValBatches, start: int = 0, workers: int = 0) -> None:
        super().__init__(
            batches,
            batch_size=None,
            sampler=StepSampler(len(batches), start),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        asked = time.perf_counter()
        for batch in super().__iter__():
            self.waited_s += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
