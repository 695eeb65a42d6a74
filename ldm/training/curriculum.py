"""The curriculum: what runs after what, handing the model on; a finished stage is not run again."""

import logging
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.checkpoint import find_latest
from ldm.data.loading.datamodule import ShardDataModule
from ldm.errors import UserError
from ldm.interop.model_folder import RECORD, write_model_folder
from ldm.training.checkpointing import PATTERN, Checkpoints
from ldm.training.ema import EMA
from ldm.training.module import TrainingModule

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A run that was asked to stop and has saved its state; `exit_status` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


@dataclass
class Job:
    """A stage, built: what is trained, on what, by what."""

    module: TrainingModule
    datamodule: ShardDataModule
    trainer: pl.Trainer
    checkpoints: Checkpoints
    ema: EMA | None
    config_text: str
    tokenizer: Path | None
    record: dict[str, Any]


@dataclass
class Stage:
    """A stage of the curriculum: its folder, and how to build it given the earlier stages' model folders."""

    name: str
    folder: Path
    build: Callable[[dict[str, Path]], Job]
    resume_from: Path | None = None

    @property
    def model(self) -> Path:
        """Where the finished model stands."""
        return self.folder / "model"

    @property
    def finished(self) -> bool:
        return (self.model / RECORD).exists()


def run(stages: list[Stage], finished: dict[str, Path]) -> dict[str, Path]:
    """Runs the stages in order; returns the model folders by stage, `finished` (earlier ones) included.

    Each stage goes on from its newest whole checkpoint, if it has one. Raises Interrupted when asked to stop.
    """
    models = dict(finished)
    for stage in stages:
        if stage.finished:
            log.info("stage %s is finished: %s", stage.name, stage.model)
        else:
            _train(stage, stage.build(models))
        models[stage.name] = stage.model
    return models


def _train(stage: Stage, job: Job) -> None:
    latest = stage.resume_from or find_latest(stage.folder / "checkpoints", PATTERN)
    log.info("stage %s: %s", stage.name, f"goes on from {latest}" if latest else "starts")
    job.trainer.fit(job.module, datamodule=job.datamodule, ckpt_path=latest)
    if job.checkpoints.stopped_by is not None:
        name = signal.Signals(job.checkpoints.stopped_by).name
        raise Interrupted(
            f"stage {stage.name} stopped by {name} after step {job.trainer.global_step} of {job.trainer.max_steps}; "
            "its state is saved, go on with resume=auto",
            job.checkpoints.stopped_by,
        )
    if job.trainer.global_step < job.trainer.max_steps:
        raise UserError(
            f"stage {stage.name} ended at step {job.trainer.global_step} of {job.trainer.max_steps}: a time or "
            "batch limit of the trainer stopped it; its state is saved, go on with resume=auto and a larger limit"
        )
    _export(stage, job)


def _export(stage: Stage, job: Job) -> None:
    """Completes the model with its averaged weights and writes its folder, on rank 0."""
    trainer, module = job.trainer, job.module
    if trainer.is_global_zero:
        raw = {name: p.detach().clone() for name, p in module.trainable_parameters().items()}
        with job.ema.swapped_in(module) if job.ema else nullcontext():
            facts = module.finalize(job.datamodule)
            state = {
                name: tensor.detach().to("cpu", copy=True) for name, tensor in module.export_module.state_dict().items()
            }
        average = {name: state[name] for name in raw} if job.ema else None
        record = job.record | {
            "kind": module.kind,
            "stage": stage.name,
            "step": trainer.global_step,
            "train_seconds": round(job.checkpoints.train_seconds, 1),
            **facts,
        }
        state |= {name: p.cpu() for name, p in raw.items()}
        write_model_folder(stage.model, record, job.config_text, state, average, job.tokenizer)
    trainer.strategy.barrier(f"{stage.name} exported")
