"""From a composed configuration to built objects: the stages of a launch, and a trained model read back."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.accelerators import CPUAccelerator

from ldm.checkpoint import RECORD as CHECKPOINT
from ldm.commands.cache_latents import use_latents
from ldm.config.check import build, check
from ldm.config.compose import CONFIGS, names
from ldm.config.devices import check_devices, pick_device
from ldm.config.infer import check_fits
from ldm.config.sources import inherit_first_stage, load_strictly, load_weights
from ldm.config.stages import stage_config
from ldm.config.watch import strategy, watch
from ldm.data.loading.fetch import View
from ldm.errors import UserError, nearest
from ldm.evaluation.evaluate import ReferenceSet
from ldm.evaluation.measures import Measure
from ldm.generation import SamplingSettings
from ldm.interop.model_folder import ModelFolder, find_model_folder
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.checkpoint_io import FolderCheckpointIO
from ldm.training.checkpointing import Checkpoints
from ldm.training.curriculum import Job, Stage
from ldm.training.diffusion import DiffusionModule
from ldm.training.ema import EMA
from ldm.training.freed_memory import keep_freed_memory
from ldm.training.kept_weights import keep_weights
from ldm.training.module import TrainingModule
from ldm.training.precision import let_clip
from ldm.versions import versions, write_versions

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------ training


def stages(cfg: DictConfig, overrides: list[str], run_folder: Path) -> tuple[list[Stage], dict[str, Path]]:
    """The stages that a launch runs, and the model folders of the finished ones that it may build on.

    All stages are composed and checked before the first one starts.
    """
    resume = _resume_path(cfg, run_folder)
    built = []
    for name in cfg.stages:
        folder = run_folder / name
        config = stage_config(cfg, name, overrides)
        config.stage_folder = str(folder)
        unresolved = deepcopy(config)  # another first stage may come with first_stage_from, and widths follow it
        try:
            OmegaConf.resolve(config)
        except OmegaConfBaseException as error:
            raise UserError(f"stage {name}: {str(error).splitlines()[0]}") from error
        order = list(cfg.curriculum).index(name)
        check(config.tasks[config.task])
        check_fits(config, [str(stage) for stage in cfg.curriculum])
        check_devices(config.trainer)
        here = resume if resume is not None and resume.parent.parent.name == name else None
        built.append(Stage(name, folder, _builder(unresolved, folder, order), here))
    every = {str(name): run_folder / str(name) / "model" for name in cfg.curriculum}
    return built, {name: path for name, path in every.items() if (path / "model.json").exists()}


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
        raise UserError(f"resume={path}: it is no checkpoint of a stage that this launch runs ({list(cfg.stages)})")
    return path


def _builder(config: DictConfig, folder: Path, order: int) -> Callable[[dict[str, Path]], Job]:
    def make(models: dict[str, Path]) -> Job:
        return build_job(config, folder, order, models)

    return make


def build_job(config: DictConfig, folder: Path, order: int, models: dict[str, Path]) -> Job:
    """A stage's objects; `models` are the finished stages' model folders by name."""
    pl.seed_everything(config.seed, workers=True, verbose=False)
    inherited = inherit_first_stage(config, models)
    OmegaConf.resolve(config)
    datamodule = build(config.data)
    datamodule.prepare_data()
    module = cast(TrainingModule, build(config.tasks[config.task]))
    load_weights(config, module, models, inherited)
    if isinstance(module, DiffusionModule):
        use_latents(config, datamodule, module.latent_diffusion)
    module.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPUs and GPUs alike
    if config.compile:
        module.compile_networks()
    keep_weights(module)

    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.every_n_steps, config.checkpoint.keep)
    ema = EMA(config.ema.decay) if config.ema.decay is not None else None
    settings = (
        None if config.task == "first_stage" else sampling_settings(config.samples, config.samples.guidance_scale)
    )
    watchers, loggers = watch(config, folder, ema, settings)
    callbacks: list[pl.Callback] = [*([ema] if ema else []), checkpoints, *watchers]
    make_trainer = partial(build(config.trainer), strategy=strategy(config.trainer, module))
    if not module.automatic_optimization:  # such a module clips by itself; Lightning refuses to
        make_trainer = partial(make_trainer, gradient_clip_val=None)
    trainer = make_trainer(callbacks=callbacks, logger=loggers, plugins=[FolderCheckpointIO()])
    let_clip(trainer)
    if isinstance(trainer.accelerator, CPUAccelerator):
        keep_freed_memory()
    text = OmegaConf.to_yaml(_exported(config))
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(text)
        write_versions(folder)
    tokenizer = Path(config.tokenizer_path) if Path(config.tokenizer_path).is_dir() else None
    record = {"experiment": config.name, "order": order, "inherited": {k: str(v) for k, v in models.items()}}
    record["versions"] = versions()
    return Job(module, datamodule, trainer, checkpoints, ema, text, tokenizer, record)


def _exported(config: DictConfig) -> DictConfig:
    """Shim: the two keys that readers of a model folder use, until the stages' configurations have them."""
    text = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(config)))
    if config.task == "diffusion":
        text.model = config.tasks.diffusion.latent_diffusion
        names = ("sampler", "grid", "guidance", "steps", "guidance_scale")
        text.sampling = {name: config.samples[name] for name in names}
        text.sampling.guidance.pop("scale", None)
    return text


# ----------------------------------------------------------------------------------------- trained models


@dataclass(frozen=True)
class Trained:
    """A trained second stage, ready to sample from, with where it came from."""

    model: LatentDiffusion
    folder: ModelFolder
    config: DictConfig


def open_trained(checkpoint: str) -> tuple[ModelFolder, DictConfig]:
    """The folder and the configuration of the model that `checkpoint` means; its weights are not read."""
    folder = find_model_folder(Path(checkpoint), "diffusion")
    return folder, cast(DictConfig, OmegaConf.create(folder.config_text))


def load_trained(checkpoint: str, weights: str, device: str) -> Trained:
    """The latent diffusion model of a run, a stage or a model folder, in eval mode on `device`."""
    folder, config = open_trained(checkpoint)
    folder.verify()
    if folder.tokenizer is not None:
        _replace(config, str(config.tokenizer_path), str(folder.tokenizer))
    model = cast(LatentDiffusion, build(config.tasks.diffusion.latent_diffusion))
    load_strictly(model, folder.weights(weights), str(folder.path))
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(model.to(pick_device(device)), folder, config)


def sampling_settings(cfg: DictConfig, guidance_scale: float) -> SamplingSettings:
    """The sampler, grid, guidance and steps of sample.py's or evaluate.py's configuration."""
    if cfg.steps < 1:
        raise UserError(f"steps={cfg.steps}: expected 1 or more")
    own = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))
    own.guidance_scale = float(guidance_scale)  # what the guidance's own scale refers to
    parts = build(own.sampler, "sampler"), build(own.grid, "grid"), build(own.guidance, "guidance")
    return SamplingSettings(*parts, cfg.steps, float(cfg.get("strength", 1.0)), float(guidance_scale))


def warn_without_dropout(config: DictConfig, scales: Iterable[float]) -> None:
    """Says so where a model is to be guided whose training never dropped its captions."""
    rates = list(_values(config.tasks.diffusion.latent_diffusion.conditioner, "dropout"))
    if not any(rates) and any(scale != 1 for scale in scales):
        log.warning(
            "guidance: this model was trained without caption dropout (conditioner.dropout), so it has not learned "
            "what guidance leads away from: use guidance_scale=1, or train with conditioner.dropout=0.1"
        )


def _values(node: Any, name: str) -> Iterator[Any]:
    """All values of that name anywhere in a configuration."""
    inside = list(node) if not isinstance(node, DictConfig) else [node[key] for key in node]
    if isinstance(node, DictConfig) and name in node:
        yield node[name]
    for part in inside:
        if OmegaConf.is_config(part):
            yield from _values(part, name)


def trained_size(trained: Trained, size: Any) -> tuple[int, int]:
    """(height, width) in pixels: as given, a number or [height, width], else what the model was trained at."""
    height, width = View.of(trained.config.data.size if size is None else size).size
    trained.model.first_stage.check_size(height, width)
    return height, width


def measures(metrics: Sequence[str], options: DictConfig, device: torch.device) -> tuple[list[Measure], dict[str, str]]:
    """The measures with the given names of configs/metric, and of those that cannot be built the reason, by name.

    `options` holds what differs from configs/metric, by name. UserError for a name that does not exist.
    """
    known = [path.stem for path in sorted((CONFIGS / "metric").glob("*.yaml"))]
    for name in metrics:
        if name not in known:
            raise UserError(f"metrics: there is no metric {name!r}; {nearest(name, known)}")
    found, missing = [], {}
    for name in metrics:
        path = f"metric_options.{name}"
        node = OmegaConf.load(CONFIGS / "metric" / f"{name}.yaml")
        given = OmegaConf.to_container(options.get(name, OmegaConf.create({})), resolve=True)
        merged = cast(DictConfig, OmegaConf.merge(node, _without_nulls(given)))
        check(merged, path)
        try:
            found.append(cast(Measure, instantiate(merged)).to(device))
        except InstantiationException as error:
            if not isinstance(error.__cause__, UserError):
                raise
            leaves = [knob for knob in names(merged) if not OmegaConf.is_config(OmegaConf.select(merged, knob))]
            knobs = [f"{path}.{knob}" for knob in leaves if not knob.endswith("_target_")]
            missing[name] = str(error.__cause__) + (f" ({', '.join(knobs)})" if knobs else "")
    return found, missing


def _without_nulls(options: Any) -> Any:
    """The options that are set, of nested ones."""
    if not isinstance(options, dict):
        return options
    return {name: _without_nulls(value) for name, value in options.items() if value is not None}


def evaluation_sets(
    trained: Trained, data: Any, size: tuple[int, int], n: int, cache: str | None = None
) -> list[ReferenceSet]:
    """The sets to evaluate on: one of the model's own by name, other shards, or all of the model's own."""
    if n < 2:
        raise UserError(f"n={n}: a distance and an interval need at least 2 pictures")
    own: dict[str, Any] = OmegaConf.to_container(trained.config.evaluation.sets)  # type: ignore[assignment]
    if data is None:
        chosen = own
    elif data in own:
        chosen = {data: own[data]}
    elif isinstance(data, str) and not Path(data).exists() and "{" not in data:
        raise UserError(f"data={data}: neither a set of the model nor shards; {nearest(data, own)}")
    else:
        chosen = {"data": OmegaConf.to_container(data) if OmegaConf.is_config(data) else data}
    return [ReferenceSet(name, shards, size, n, cache) for name, shards in chosen.items()]


def _replace(node: Any, old: str, new: str) -> None:
    """Replaces a string wherever it stands in a configuration."""
    for name in list(node) if isinstance(node, DictConfig) else range(len(node)):
        value = node[name]
        if OmegaConf.is_config(value):
            _replace(value, old, new)
        elif value == old:
            node[name] = new
