"""Shards as a LightningDataModule that resumes exactly where a run stopped.

One Lightning epoch is the whole run. The state is a few integers: the optimizer steps done, and what the
order of samples depends on.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.data.loading.batch import Batch
from ldm.data.loading.data_record import write_record
from ldm.data.loading.decode import decoder
from ldm.data.loading.fetch import Fetcher, View
from ldm.data.loading.loader import StepLoader, TrainBatches, ValBatches
from ldm.data.loading.quarantine import Quarantine, Skipped
from ldm.data.loading.shard_source import Source
from ldm.data.order.buckets import Buckets
from ldm.data.order.filters import Filter
from ldm.data.order.plan import Plan, micro_batch
from ldm.data.order.selection import Selection, SelectionRequest, select
from ldm.data.shards.index import Manifest, index_shards
from ldm.data.shards.picture import Size
from ldm.errors import UserError

GiB = 1 << 30

log = logging.getLogger(__name__)


class ShardDataModule(pl.LightningDataModule):
    """Batches for `total_steps` optimizer steps of `global_batch` samples, over any ranks and workers.

    train, val     where the samples come from; val None: no validation; train None: a subclass has another source
    size           side of the images in pixels, or [height, width]
    total_steps    optimizer steps of the whole run
    accumulation   micro-steps of an optimizer step; None: the Trainer's accumulate_grad_batches
    window         samples mixed with each other, see Plan; None: all
    workers        loader processes of each rank
    val_samples    validation uses the first so many samples (all, where there are fewer)
    val_batch      samples of a validation batch of one rank; None: as in training
    cache_gib      memory of each loader process for decoded pictures
    max_bad        the run ends when more than this share of the samples is bad,
    max_bad_of_shard   or of a shard's samples
    buckets        aspect-ratio buckets to train in, about as large as `size`; None: all at `size`
    mixed_with     further sources by name, mixed with `train` by their weights
    decode         how JPEGs are decoded: exact, fast or lanczos, see ldm/data/loading/decode.py
    threads        of each loader process (or of the rank, where it has none) that decode; 0: the process itself
    folder         for data.json, the samples used, and quarantine.jsonl, the bad ones; None: nowhere

    Training calls `advance(steps)` with the number of steps done after each optimizer step, before anything
    saves a checkpoint: that number is what the checkpoint keeps. (A module's own `on_train_batch_end` is too
    late, callbacks come before it.)
    """

    def __init__(
        self,
        train: Source | None,
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
        max_bad_of_shard: float = 0.05,
        buckets: Buckets | None = None,
        mixed_with: Mapping[str, Source] | None = None,
        decode: str = "exact",
        threads: int = 0,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        if total_steps < 1:
            raise UserError(f"total_steps must be at least 1, got {total_steps}")
        decoder(decode)
        self.size = size
        self.global_batch, self.total_steps, self.seed = global_batch, total_steps, seed
        self.workers, self.accumulation, self.window = workers, accumulation, window
        self.val_samples, self.val_batch = val_samples, val_batch
        self.cache_bytes = int(cache_gib * GiB)
        self.max_bad, self.max_bad_of_shard = max_bad, max_bad_of_shard
        self.buckets, self.decode, self.threads = buckets, decode, threads
        self.folder = Path(folder) if folder is not None else None
        self.sources = ({} if train is None else {"train": train}) | dict(mixed_with or {})
        self.val = val
        self.quarantine: Quarantine | Skipped
        self.steps_done = 0
        self._restored: dict[str, Any] = {}

    @property
    def sizes(self) -> list[Size]:
        """The (height, width) that batches may have."""
        size = View.of(self.size).size
        return self.buckets.sizes(size) if self.buckets else [size]

    def _all_sources(self) -> list[Source]:
        """The training sources and the validation's."""
        return [*self.sources.values(), *([self.val] if self.val is not None else [])]

    def index(self) -> None:
        """Indexes the shards of all sources."""
        for source in self._all_sources():
            index_shards(source.shards, source.index, remote=source.remote)

    def prepare_data(self) -> None:
        """Indexes the shards and selects the samples, in one process of each machine."""
        self.index()
        self.select([source.manifest() for source in self.sources.values()])

    def setup(self, stage: str | None = None) -> None:
        """Opens the manifests and makes the plan. Raises UserError for data that cannot be trained on."""
        manifests = [source.manifest() for source in self.sources.values()]
        self.used_sizes, selections = self.select(manifests)
        triples = zip(self.sources.values(), manifests, selections, strict=True)
        self.fetchers = [self._fetcher(*triple, self.used_sizes) for triple in triples]
        self.train_fetcher = self.fetchers[0]
        counts = [selection.counts for selection in selections]
        self.plan = Plan(counts, self.global_batch, self.seed, self.window, self._weights())
        rank = self.trainer.global_rank if self.trainer is not None else 0
        name = f"quarantine_rank{rank}.jsonl" if rank else "quarantine.jsonl"
        file = self.folder / name if self.folder is not None else None
        self.quarantine = Quarantine(manifests, self.max_bad, of_shard=self.max_bad_of_shard, file=file)
        if rank == 0:
            write_record(self.folder, dict(zip(self.sources, self.fetchers, strict=True)), self.used_sizes, self.decode)
        self.setup_val()

    def setup_val(self) -> None:
        """Opens the validation manifest, where there is one."""
        if self.val is not None:
            manifest = self.val.manifest()
            sizes, selection = self.select_val(manifest)
            self.val_fetcher = self._fetcher(self.val, manifest, selection, sizes)
            self.val_quarantine = Quarantine(manifest, self.max_bad)

    def select(self, manifests: Sequence[Manifest]) -> tuple[list[Size], list[Selection]]:
        """(sizes that are trained at, the selection of each source), of the sources' manifests in their order."""
        if not self.sources:
            raise UserError("this data has no training shards; give train")
        pairs = zip(self.sources.items(), manifests, strict=True)
        requests = [_request(name, source, manifest) for (name, source), manifest in pairs]
        return select(requests, self.buckets, View.of(self.size).size, self.global_batch, self._weights())

    def _weights(self) -> list[float] | None:
        """The sources' weights; None where no source has one."""
        by_name = {name: source.weight for name, source in self.sources.items()}
        if all(weight is None for weight in by_name.values()):
            return None
        weights = [weight for weight in by_name.values() if weight is not None and 0 < weight < float("inf")]
        if len(weights) < len(by_name):
            raise UserError(f"the weights of mixed sources are {by_name}; give all of them a weight above 0, or none")
        return weights

    def select_val(self, manifest: Manifest) -> tuple[list[Size], Selection]:
        """(the one size of validation, the selection) of the validation source's manifest."""
        if self.val is None:
            raise UserError("this data has no validation shards; give val")
        sizes, (selection,) = select([_request("val", self.val, manifest)], size=View.of(self.size).size)
        return sizes, selection

    def _fetcher(self, source: Source, manifest: Manifest, selection: Selection, sizes: Sequence[Size]) -> Fetcher:
        return source.fetcher(manifest, sizes, self.seed, self.cache_bytes, self.decode, selection)

    def check_first_stage(self, fingerprint: str | None) -> None:
        """Raises UserError where precomputed latents are not this first stage's; None accepts only pictures."""
        for source in self._all_sources():
            encoder = source.first_stage
            if encoder is not None and encoder != fingerprint:
                wanted = f"is {fingerprint}" if fingerprint else "is trained here, on pictures"
                raise UserError(
                    f"the latents in {source.shards} were made by the first stage {encoder}, this one {wanted}: train "
                    "from the pictures' shards, or compute latents of them with python -m ldm.data.cache"
                )

    def train_batches(self, rank: int = 0, world: int = 1, accumulation: int = 1) -> TrainBatches:
        """The batches of a rank, item i for micro-step i. After `setup`."""
        at = (rank, world, accumulation)
        sizes = self.used_sizes if self.buckets else None
        return TrainBatches(self.fetchers, self.plan, self.total_steps, *at, sizes=sizes, threads=self.threads)

    def val_batches(self, rank: int = 0, world: int = 1, accumulation: int = 1) -> ValBatches:
        """The validation batches of a rank. After `setup`."""
        if self.val is None:
            raise UserError("this data has no validation shards; give val")
        batch = self.val_batch or micro_batch(self.global_batch, world, accumulation)
        samples = min(self.val_samples, len(self.val_fetcher.selection))
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
        """Records that `steps` optimizer steps are done; called after each, before a checkpoint."""
        self.steps_done = steps

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch; its bad samples are counted. Raises UserError when they are too many."""
        training = self.trainer is None or self.trainer.training
        (self.quarantine if training else self.val_quarantine).add(batch)
        return batch

    def _order(self) -> dict[str, Any]:
        """What the order of samples depends on."""
        fingerprints = [fetcher.manifest.fingerprint for fetcher in self.fetchers]
        return {
            "seed": self.seed,
            "global_batch": self.global_batch,
            "window": None if self.window is None else f"{self.window} in equal parts",
            "fingerprint": " ".join(fingerprints),
            "where": " | ".join(source.where or "all" for source in self.sources.values()),
            "sizes": ", ".join(f"{h}x{w}" for h, w in self.used_sizes) if self.buckets else "",
            "samples": str(self.plan.samples.tolist()),
            "weights": str(self._weights()),
        }

    def state_dict(self) -> dict[str, Any]:
        """The optimizer steps done, and what the order depends on."""
        if self.trainer is not None and self.trainer.global_step > 0 and self.steps_done == 0:
            raise RuntimeError("training must call datamodule.advance(steps) before it saves")
        return {"step": self.steps_done, **self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes after `state_dict`; it is compared when training begins."""
        self._restored = dict(state_dict)
        self.steps_done = int(state_dict["step"])

    def _check_restored(self) -> None:
        """Raises UserError where the order of samples is not the checkpoint's."""
        order = self._order()
        changed = [name for name in order if name in self._restored and self._restored[name] != order[name]]
        if changed:
            changes = ", ".join(f"{name} {self._restored[name]} (now {order[name]})" for name in changed)
            raise UserError(
                f"the checkpoint was trained in another order of samples: {changes}; "
                "resume with the same data and settings, or start a new run from its weights"
            )


def _request(name: str, source: Source, manifest: Manifest) -> SelectionRequest:
    return SelectionRequest(name, manifest, Filter(source.where) if source.where else None)


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
