"""Shards as a LightningDataModule that goes on exactly where a run stopped.

One Lightning epoch is the whole run. The state is a few integers: the optimizer steps done, and what the
order of samples depends on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytorch_lightning as pl

from ldm.data.batch import Batch
from ldm.data.fetch import Fetcher, View
from ldm.data.index import Manifest, index_shards, load_manifest
from ldm.data.loader import StepLoader, TrainBatches, ValBatches
from ldm.data.plan import Plan, micro_batch
from ldm.data.quarantine import Quarantine
from ldm.data.shards import Shards
from ldm.errors import UserError

GiB = 1 << 30


class Source(Protocol):
    """Where samples come from: pictures, or latents that a first stage made of them beforehand."""

    @property
    def shards(self) -> Shards:
        """The shards, as `expand` takes them."""

    @property
    def index(self) -> str | None:
        """Folder for the manifest; None: `.index` beside the shards."""

    @property
    def first_stage(self) -> str | None:
        """The fingerprint of the first stage that the latents were made by; None where they are pictures."""

    def manifest(self) -> Manifest:
        """The manifest. Raises UserError for missing, damaged or empty shards."""

    def fetcher(self, manifest: Manifest, size: int | Sequence[int], seed: int, cache_bytes: int) -> Fetcher:
        """What reads the samples of `manifest` at a size in pixels."""


@dataclass(frozen=True)
class ShardSource:
    """A list of shards, and how its pictures are taken.

    shards           a brace pattern, a folder or a list
    random_crop      crop anywhere, not at the centre
    flip             mirror half of the samples (captions that tell left from right become wrong)
    require_caption  a sample without caption is bad; false gives it the empty caption (first stages)
    allow_damaged    train on the whole samples of damaged shards
    index            folder for the manifest; None: `.index` beside the shards
    """

    shards: Shards
    random_crop: bool = False
    flip: bool = False
    require_caption: bool = True
    allow_damaged: bool = False
    index: str | None = None

    def manifest(self) -> Manifest:
        """The manifest. Raises UserError for missing, damaged or empty shards."""
        return load_manifest(self.shards, self.allow_damaged, self.index)

    @property
    def first_stage(self) -> None:
        """None: they are pictures."""
        return None

    def fetcher(self, manifest: Manifest, size: int | Sequence[int], seed: int, cache_bytes: int) -> Fetcher:
        """Reads pictures that cover `size`; up to `cache_bytes` of them are kept decoded."""
        return Fetcher(manifest, View.of(size, self.random_crop, self.flip), seed, self.require_caption, cache_bytes)


class ShardDataModule(pl.LightningDataModule):
    """Batches for `total_steps` optimizer steps of `global_batch` samples, over any ranks and workers.

    train, val     where the samples come from; val None: no validation
    size           side of the images in pixels, or [height, width]
    total_steps    optimizer steps of the whole run
    accumulation   micro-steps of an optimizer step; None: the Trainer's accumulate_grad_batches
    window         samples mixed with each other, see Plan; None: all
    workers        loader processes of each rank
    val_samples    validation uses the first so many samples (all, where there are fewer)
    val_batch      samples of a validation batch of one rank; None: as in training
    cache_gib      memory of each loader process for decoded pictures
    max_bad        the run ends when more than this share of the samples is bad

    Training calls `advance(steps)` with the number of steps done after each optimizer step, before anything
    saves a checkpoint: that number is what the checkpoint keeps. (A module's own `on_train_batch_end` is too
    late, callbacks come before it.)
    """

    def __init__(
        self,
        train: Source,
        val: Source | None,
        size: int | Sequence[int],
        global_batch: int,
        total_steps: int,
        seed: int = 0,
        workers: int = 0,
        accumulation: int | None = None,
        window: int | None = None,
        val_samples: int = 512,
        val_batch: int | None = None,
        cache_gib: float = 0.0,
        max_bad: float = 0.01,
    ) -> None:
        super().__init__()
        if total_steps < 1:
            raise UserError(f"total_steps must be at least 1, got {total_steps}")
        self.train, self.val = train, val
        self.size = size
        self.global_batch, self.total_steps, self.seed = global_batch, total_steps, seed
        self.workers, self.accumulation, self.window = workers, accumulation, window
        self.val_samples, self.val_batch = val_samples, val_batch
        self.cache_bytes = int(cache_gib * GiB)
        self.max_bad = max_bad
        self.steps_done = 0
        self._restored: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Indexes the shards, in one process of each machine."""
        for source in (self.train, self.val):
            if source is not None:
                index_shards(source.shards, source.index)

    def setup(self, stage: str | None = None) -> None:
        """Opens the manifests and lays the plan."""
        manifest = self.train.manifest()
        self.train_fetcher = self._fetcher(self.train, manifest)
        self.plan = Plan(len(manifest), self.global_batch, self.seed, self.window)
        self.quarantine = Quarantine(manifest, self.max_bad)
        if self.val is not None:
            held_out = self.val.manifest()
            self.val_fetcher = self._fetcher(self.val, held_out)
            self.val_quarantine = Quarantine(held_out, self.max_bad)

    def _fetcher(self, source: Source, manifest: Manifest) -> Fetcher:
        return source.fetcher(manifest, self.size, self.seed, self.cache_bytes)

    def check_first_stage(self, fingerprint: str | None) -> None:
        """Raises UserError where latents made beforehand are not this first stage's; None takes pictures alone."""
        for source in (self.train, self.val):
            made_by = source.first_stage if source is not None else None
            if source is not None and made_by is not None and made_by != fingerprint:
                wanted = f"is {fingerprint}" if fingerprint else "is trained here, on pictures"
                raise UserError(
                    f"the latents in {source.shards} were made by the first stage {made_by}, this one {wanted}: train "
                    "from the pictures' shards, or make latents of them with python -m ldm.data.cache"
                )

    def train_batches(self, rank: int = 0, world: int = 1, accumulation: int = 1) -> TrainBatches:
        """The batches of a rank, item i for micro-step i. After `setup`."""
        return TrainBatches(self.train_fetcher, self.plan, self.total_steps, rank, world, accumulation)

    def val_batches(self, rank: int = 0, world: int = 1, accumulation: int = 1) -> ValBatches:
        """The validation batches of a rank. After `setup`."""
        if self.val is None:
            raise UserError("this data has no validation shards; give val")
        batch = self.val_batch or micro_batch(self.global_batch, world, accumulation)
        samples = min(self.val_samples, len(self.val_fetcher.manifest))
        if samples < world:
            raise UserError(f"{samples} validation samples for {world} ranks; give at least one for each")
        return ValBatches(self.val_fetcher, samples, batch, rank, world)

    def train_dataloader(self) -> StepLoader:
        """The rest of the run from `steps_done` on. Raises UserError for another order's checkpoint."""
        self._check_restored()
        rank, world, accumulation = self._layout()
        batches = self.train_batches(rank, world, accumulation)
        start = self.steps_done * accumulation
        if self.trainer is not None:
            _align_progress(self.trainer, start)
        return StepLoader(batches, start, self.workers)

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """The fixed validation batches; none without validation shards."""
        return [] if self.val is None else StepLoader(self.val_batches(*self._layout()), workers=self.workers)

    def _layout(self) -> tuple[int, int, int]:
        """(rank, world, accumulation) under the trainer, or of a single process."""
        trainer = self.trainer
        if trainer is None:
            return 0, 1, self.accumulation or 1
        accumulation = self.accumulation or trainer.accumulate_grad_batches
        module = trainer.lightning_module
        if module.automatic_optimization and accumulation != trainer.accumulate_grad_batches:
            raise UserError(
                f"the data accumulates {accumulation} micro-steps, "
                f"the Trainer {trainer.accumulate_grad_batches}; give the data None or the same"
            )
        return trainer.global_rank, trainer.world_size, accumulation

    def advance(self, steps: int) -> None:
        """Notes that `steps` optimizer steps are done; called after each, before a checkpoint."""
        self.steps_done = steps

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch; its bad samples are counted. Raises UserError when they are too many."""
        training = self.trainer is None or self.trainer.training
        (self.quarantine if training else self.val_quarantine).add(batch)
        return batch

    def _order(self) -> dict[str, Any]:
        """What the order of samples depends on."""
        return {
            "seed": self.seed,
            "global_batch": self.global_batch,
            "window": self.window,
            "fingerprint": self.train_fetcher.manifest.fingerprint,
        }

    def state_dict(self) -> dict[str, Any]:
        """The optimizer steps done, and what the order depends on."""
        if self.trainer is not None and self.trainer.global_step > 0 and self.steps_done == 0:
            raise RuntimeError("training must call datamodule.advance(steps) before it saves")
        return {"step": self.steps_done, **self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after `state_dict`; it is compared when training begins."""
        self._restored = dict(state_dict)
        self.steps_done = int(state_dict["step"])

    def _check_restored(self) -> None:
        """Raises UserError where the order of samples is not the checkpoint's."""
        order = self._order()
        other = [name for name in order if name in self._restored and self._restored[name] != order[name]]
        if other:
            told = ", ".join(f"{name} {self._restored[name]} (now {order[name]})" for name in other)
            raise UserError(
                f"the checkpoint was trained in another order of samples: {told}; "
                "resume with the same data and settings, or start a new run from its weights"
            )


def _align_progress(trainer: pl.Trainer, start: int) -> None:
    """Makes Lightning's count of batches done agree with `start` micro-steps.

    They differ after a stop in the middle of an accumulation, whose gradients are lost, and where the number
    of micro-steps of a step has changed. Lightning takes the count from `completed`, and adds one where the
    checkpoint was written in `on_train_batch_end`, before `completed` was counted.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    total, current = progress.total, progress.current
    pending = total.ready == total.started == total.processed == total.completed + 1  # type: ignore[attr-defined]
    if trainer.fit_loop.restarting and current.completed + pending != start:
        current.completed = start - pending
        current.ready = current.started = current.processed = start  # type: ignore[attr-defined]
