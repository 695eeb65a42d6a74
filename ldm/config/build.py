"""From a composed configuration to the built stages of a launch."""

import logging
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import Logger

from ldm.checkpoint import RECORD as CHECKPOINT
from ldm.config.check import build, check, check_type
from ldm.config.devices import check_devices
from ldm.config.infer import check_fit, fill_widths
from ldm.config.sources import inherit_first_stage, load_weights
from ldm.config.stages import stage_config
from ldm.errors import UserError
from ldm.networks.cpu import keep_freed_memory
from ldm.training.checkpoint_io import FolderCheckpointIO
from ldm.training.checkpointing import DataPosition
from ldm.training.curriculum import Job, Stage
from ldm.training.metrics_file import METRICS, MetricsFile, Rewind
from ldm.training.module import TrainingModule
from ldm.training.precision import let_clip
from ldm.versions import versions, write_versions

log = logging.getLogger(__name__)

CacheLatents = Callable[[DictConfig, Any, TrainingModule], None]
"""Lets a built stage train from cached latents where its knob `latents` says so."""

REFUSED = {  # arguments of the Trainer that have another place, or no meaning here
    "callbacks": "use the group callbacks: callbacks=[default,mine], or callbacks.NAME={_target_: ...}",
    "logger": "use the group logger: logger=csv, logger=[csv,wandb], or logger.NAME={_target_: ...}",
    "default_root_dir": "every file of a run is in its folder; use hydra.run.dir",
    "enable_checkpointing": "use callbacks.checkpoints (callbacks.checkpoints=null: none)",
    "enable_progress_bar": "use callbacks.progress (callbacks.progress=null: none)",
    "max_epochs": "one epoch is the whole run; use trainer.max_steps",
    "min_epochs": "one epoch is the whole run; use trainer.max_steps",
    "min_steps": "a stage always runs to trainer.max_steps",
    "check_val_every_n_epoch": "one epoch is the whole run; use trainer.val_check_interval, in batches",
    "reload_dataloaders_every_n_epochs": "one epoch is the whole run",
    "use_distributed_sampler": "the data's own plan shares out the samples",
    "overfit_batches": "use data.train.where or fewer shards",
    "fast_dev_run": "use variant=tiny",
    "barebones": "it leaves out what a run is made of",
}


KNOBS: dict[str, Any] = {  # read by the launch itself, with their types
    "name": str,
    "seed": int,
    "resume": str | None,
    "objective": str | None,
    "latents": str | None,
    "latent_variants": int,
    "latent_text": bool,
    "compile": bool,
    "stages": list[str],
    "first_stage_from": str | None,
    "init_from": str | None,
    "init_parts": list[str] | None,
    "tokenizer_path": str,
    "evaluation.metrics": list[str],
}


def stages(
    cfg: DictConfig, overrides: list[str], run_folder: Path, cache_latents: CacheLatents | None = None
) -> tuple[list[Stage], dict[str, Path]]:
    """The stages that a launch runs, and the model folders of the finished ones that it may build on.

    All stages are composed and checked before the first one starts.
    """
    _check_launch(cfg, run_folder)
    resume = _resume_path(cfg, run_folder)
    built = []
    for name in cfg.stages:
        folder = run_folder / name
        config = stage_config(cfg, name, overrides)
        config.stage_folder = str(folder)
        check_stage(config, [str(stage) for stage in cfg.curriculum])
        here = resume if resume is not None and resume.parent.parent.name == name else None
        order = list(cfg.curriculum).index(name)
        built.append(Stage(name, folder, _builder(config, folder, order, cache_latents), here))
    every = {str(name): run_folder / str(name) / "model" for name in cfg.curriculum}
    return built, {name: path for name, path in every.items() if (path / "model.json").exists()}


def _check_launch(cfg: DictConfig, run_folder: Path) -> None:
    """Raises UserError for stages that are no list of different names, and for what the launch sets by itself."""
    _check_knobs(cfg)
    if not cfg.stages or len(set(cfg.stages)) < len(cfg.stages):
        raise UserError(f"stages={list(cfg.stages)}: name one or more of {list(map(str, cfg.curriculum))}, each once")
    for name in ("stage", "stage_folder"):
        if cfg[name] is not None:
            raise UserError(f"{name}={cfg[name]}: it is set for each stage; choose stages by stages=[...]")
    if Path(cfg.run_folder).resolve() != run_folder.resolve():
        raise UserError(f"run_folder={cfg.run_folder}: this run is in {run_folder}; give hydra.run.dir=FOLDER")


def _check_knobs(config: DictConfig) -> None:
    for name, hint in KNOBS.items():
        check_type(OmegaConf.select(config, name), hint, name)


def check_stage(config: DictConfig, stages: list[str]) -> None:
    """Raises UserError for what cannot be built, as far as that shows before the stage's turn."""
    config = deepcopy(config)
    _check_knobs(config)
    if config.latents is None and (config.latent_variants != 1 or config.latent_text):
        raise UserError("latents=null: latent_variants and latent_text are of cached latents; give latents=auto")
    check_devices(config.trainer)
    try:
        fill_widths(config)
        OmegaConf.resolve(deepcopy(config))
    except OmegaConfBaseException as error:
        raise UserError(f"stage {config.stage}: {str(error).splitlines()[0]}") from error
    for name in ("task", "data"):
        check(config[name], name)
    _check_trainer(config.trainer)
    for group in ("callbacks", "logger"):
        for name, node in _entries(config, group).items():
            check(node, f"{group}.{name}")
    check_fit(config, stages)


def _check_trainer(node: DictConfig) -> None:
    for name, advice in REFUSED.items():
        if name in node:
            raise UserError(f"trainer.{name}: {advice}")
    check(node, "trainer")


def _entries(config: DictConfig, group: str) -> dict[str, DictConfig]:
    """The callbacks or loggers by name; UserError for one that is neither a node nor null."""
    found = {}
    for name, node in (config.get(group) or {}).items():
        if node is None:
            continue
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise UserError(f"{group}.{name}={node}: expected a node with a _target_, or {group}.{name}=null for none")
        found[str(name)] = node
    return found


def _resume_path(cfg: DictConfig, run_folder: Path) -> Path | None:
    """The checkpoint named by resume=PATH, if one was named; UserError where the path is neither that nor the run."""
    if cfg.resume is None or cfg.resume == "auto":
        return None
    path = Path(cfg.resume).resolve()
    if not path.exists():
        raise UserError(f"resume={cfg.resume}: nothing is there; give a run's folder, a checkpoint of it, or auto")
    if path == run_folder.resolve():
        return None
    if not (path / CHECKPOINT).is_file():
        raise UserError(
            f"resume={cfg.resume}: this is neither a run's folder (it has no .hydra) nor a checkpoint (it has no "
            f"{CHECKPOINT}); give outputs/NAME/TIME, or STAGE/checkpoints/step_N in it"
        )
    if path.parent.parent.name not in cfg.stages:
        raise UserError(f"resume={path}: it is not a checkpoint of a stage that this launch runs ({list(cfg.stages)})")
    return path


def _builder(
    config: DictConfig, folder: Path, order: int, cache_latents: CacheLatents | None
) -> Callable[[dict[str, Path]], Job]:
    return lambda models: build_job(config, folder, order, models, cache_latents)


def build_job(
    config: DictConfig,
    folder: Path,
    order: int,
    models: Mapping[str, Path],
    cache_latents: CacheLatents | None = None,
) -> Job:
    """A stage's objects; `models` are the finished stages' model folders by name."""
    pl.seed_everything(config.seed, workers=True, verbose=False)
    inherited = inherit_first_stage(config, models)
    fill_widths(config)
    datamodule = build(config.data, "data")
    datamodule.prepare_data()
    module = build(config.task, "task")
    if not isinstance(module, TrainingModule):
        raise UserError(f"task: {config.task._target_} is not an ldm.training.module.TrainingModule")
    load_weights(config, module, models, inherited)
    if cache_latents is not None:
        cache_latents(config, datamodule, module)
    module.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPUs and GPUs alike
    if config.compile:
        for network in module.compiled_networks():
            network.compile()
    trainer = _trainer(config, module, folder)
    resolved = deepcopy(config)
    OmegaConf.resolve(resolved)
    resolved.model = resolved.task[module.exported]
    text = OmegaConf.to_yaml(resolved)
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(text)
        write_versions(folder)
    tokenizer = Path(config.tokenizer_path) if Path(config.tokenizer_path).is_dir() else None
    record = {"experiment": config.name, "order": order, "inherited": {k: str(v) for k, v in models.items()}}
    record["versions"] = versions()
    return Job(module, datamodule, trainer, text, tokenizer, record)


def _trainer(config: DictConfig, module: TrainingModule, folder: Path) -> pl.Trainer:
    """The trainer with its callbacks, loggers and the folder checkpoints; whatever the task needs of it."""
    metrics = MetricsFile(folder / METRICS)
    callbacks = [DataPosition(), Rewind(metrics), *_built(config, "callbacks", pl.Callback)]
    loggers = [metrics, *_built(config, "logger", Logger)]
    for logger in loggers:
        logger.log_hyperparams(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)))
    keys = [callback.state_key for callback in callbacks if type(callback).state_dict is not pl.Callback.state_dict]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"callbacks: two of them keep their state under {key!r}; leave one out, or set it apart")
    make_trainer = build(config.trainer, "trainer")
    arguments: dict[str, Any] = {
        "callbacks": callbacks,
        "logger": loggers,
        "plugins": [*(make_trainer.keywords.get("plugins") or []), FolderCheckpointIO()],
        "strategy": _strategy(config.trainer, module),
        "default_root_dir": str(folder),
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks),
    }
    if not module.automatic_optimization:  # such a module clips by itself; Lightning refuses to
        arguments["gradient_clip_val"] = None
    try:
        trainer = cast(pl.Trainer, make_trainer(**arguments))
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {str(error).strip()}") from error
    let_clip(trainer)
    if isinstance(trainer.accelerator, CPUAccelerator):
        keep_freed_memory()
    return trainer


def _built(config: DictConfig, group: str, kind: type) -> list[Any]:
    found = []
    for name, node in _entries(config, group).items():
        entry = build(node, f"{group}.{name}")
        if not isinstance(entry, kind):
            raise UserError(f"{group}.{name}: {node['_target_']} is not a {kind.__module__}.{kind.__name__}")
        found.append(entry)
    return found


def _strategy(trainer: DictConfig, module: TrainingModule) -> Any:
    """The trainer's strategy; where steps leave parameters unused (a discriminator's turn), DDP looks for them."""
    several = trainer.devices not in (1, "1") or trainer.num_nodes > 1
    if module.unused_parameters and (trainer.strategy == "ddp" or (trainer.strategy == "auto" and several)):
        log.info("strategy: ddp_find_unused_parameters_true, since each step leaves parameters unused")
        return "ddp_find_unused_parameters_true"
    return trainer.strategy
