"""What watches a stage while it trains: its metrics file, loggers, throughput, sheets of pictures, progress bar."""

import logging
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger

from ldm.config.check import build
from ldm.generation import SamplingSettings
from ldm.training.ema import EMA
from ldm.training.first_stage import FirstStageModule
from ldm.training.images import ReconstructionSheets, SampleSheets, Sheets
from ldm.training.metrics_file import METRICS, MetricsFile, Rewind
from ldm.training.module import TrainingModule
from ldm.training.progress import Progress
from ldm.training.throughput import Throughput

log = logging.getLogger(__name__)


def watch(
    config: DictConfig, folder: Path, ema: EMA | None, settings: SamplingSettings | None
) -> tuple[list[pl.Callback], list[Logger]]:
    """The callbacks and the loggers of a stage; it is sampled from with `settings`, a first stage (None) decodes."""
    metrics, throughput = MetricsFile(folder / METRICS), Throughput(config.trainer.log_every_n_steps)
    callbacks: list[pl.Callback] = [Rewind(metrics), throughput]
    if config.samples.every_n_steps is not None:
        callbacks.append(_sheets(config.samples, folder / "samples", ema, settings, throughput))
    if config.trainer.enable_progress_bar:
        callbacks.append(Progress(config.stage))
    loggers: list[Logger] = [metrics]
    if config.logger is not None:
        loggers.append(build(config.logger))
        loggers[-1].log_hyperparams(cast(dict[str, Any], OmegaConf.to_container(config)))
    return callbacks, loggers


def _sheets(
    given: DictConfig, folder: Path, ema: EMA | None, settings: SamplingSettings | None, throughput: Throughput
) -> Sheets:
    if settings is None:
        return ReconstructionSheets(folder, given.every_n_steps, given.n, ema, throughput.paused)
    prompts = None if given.prompts is None else [str(prompt) for prompt in given.prompts]
    return SampleSheets(
        folder, given.every_n_steps, settings, prompts, given.n, given.seed, ema, paused=throughput.paused
    )


def strategy(trainer: DictConfig, module: TrainingModule) -> Any:
    """The trainer's strategy; where there is a discriminator, DDP is told that each step leaves parameters unused."""
    several = isinstance(trainer.devices, int) and trainer.devices * trainer.num_nodes > 1
    discriminates = isinstance(module, FirstStageModule) and module.loss.discriminator is not None
    if discriminates and (trainer.strategy == "ddp" or (trainer.strategy == "auto" and several)):
        log.info("strategy: ddp_find_unused_parameters_true, since the first stage has a discriminator")
        return "ddp_find_unused_parameters_true"
    return trainer.strategy
