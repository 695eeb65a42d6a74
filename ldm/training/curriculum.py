"""The curriculum: what runs after what, handing the model on; a finished stage is not run again."""

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.checkpoint import find_latest
from ldm.data.loading.datamodule import ShardDataModule
from ldm.errors import Interrupted, UserError
from ldm.interop.model_folder import RECORD, write_model_folder
from ldm.training.checkpointing import PATTERN, Checkpoints
from ldm.training.ema import averaged
from ldm.training.module import TrainingModule

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A stage, built: what is trained, on what, by what; and what goes into the model folder."""

    module: TrainingModule
    datamodule: ShardDataModule
    trainer: pl.Trainer
    config_text: str
    tokenizer: Path | None
    record: dict[str, Any]

    @property
    def checkpoints(self) -> Checkpoints | None:
        """The callback that saves checkpoints, if there is one."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, Checkpoints)), None)


@dataclass
class Stage:
    """A stage of the curriculum: its folder, and how to build it given the earlier stages' model folders."""

    name: str
    folder: Path
    build: Callable[[dict[str, Path]], Job]
    resume_from: Path | None = None

    @property
    def model(self) -> Path:
        """The folder of the finished model."""
        return self.folder / "model"

    @property
    def finished(self) -> bool:
        return (self.model / RECORD).exists()


def run(stages: list[Stage], finished: dict[str, Path]) -> dict[str, Path]:
    """Runs the stages in order; returns the model folders by stage, `finished` (earlier ones) included.

    Each stage resumes from its newest whole checkpoint, if it has one. Raises Interrupted when asked to stop.
    """
    models = dict(finished)
    for number, stage in enumerate(stages, start=1):
        if stage.finished:
            log.info("stage %s (%d of %d) is finished: %s", stage.name, number, len(stages), stage.model)
        else:
            log.info("stage %s (%d of %d): %s", stage.name, number, len(stages), stage.folder)
            _train(stage, stage.build(models))
        models[stage.name] = stage.model
    return models


def _train(stage: Stage, job: Job) -> None:
    latest = stage.resume_from or find_latest(stage.folder / "checkpoints", PATTERN)
    if latest:
        log.info("stage %s resumes from %s", stage.name, latest)
    job.trainer.fit(job.module, datamodule=job.datamodule, ckpt_path=latest)
    steps = f"step {job.trainer.global_step} of {job.trainer.max_steps}"
    saved = "its state is saved: continue with resume=auto" if job.checkpoints else "nothing is saved (no checkpoints)"
    stopped_by = job.checkpoints.stopped_by if job.checkpoints else None
    if stopped_by is not None:
        name = signal.Signals(stopped_by).name
        raise Interrupted(f"stage {stage.name} stopped by {name} after {steps}; {saved}", stopped_by)
    if job.trainer.global_step < job.trainer.max_steps:
        raise UserError(
            f"stage {stage.name} ended at {steps}: a time or batch limit of the trainer, or a callback, stopped it; "
            f"{saved}, with a larger limit"
        )
    _export(stage, job)


def _export(stage: Stage, job: Job) -> None:
    """Completes the model with its averaged weights and writes its folder, on rank 0."""
    trainer, module = job.trainer, job.module
    if trainer.is_global_zero:
        raw = {name: p.detach().clone() for name, p in module.trainable_parameters().items()}
        with averaged(trainer) as has_average:
            facts = module.finalize(job.datamodule)
            weights = module.export_module.state_dict()
            state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
        average = {name: state[name] for name in raw} if has_average else None
        record = job.record | {
            "kind": module.kind,
            "stage": stage.name,
            "step": trainer.global_step,
            "objective": module.objective,
            "train_seconds": round(job.checkpoints.train_seconds if job.checkpoints else 0.0, 1),
            **facts,
        }
        state |= {name: p.cpu() for name, p in raw.items()}
        write_model_folder(stage.model, record, job.config_text, state, average, job.tokenizer)
    trainer.strategy.barrier(f"{stage.name} exported")
