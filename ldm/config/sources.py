"""Where the weights to begin with come from: an earlier stage, a model of this project, or a file of another tool."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.conditioning.text import TextConditioner
from ldm.config.check import build, locate
from ldm.config.trained import load_into
from ldm.errors import UserError, nearest
from ldm.first_stage.autoencoder import FirstStage
from ldm.interop.convert import read
from ldm.interop.nodes import STATISTICS
from ldm.interop.package import Package
from ldm.interop.tokenizers import vocabulary
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.frozen import note_origin
from ldm.training.module import TrainingModule

log = logging.getLogger(__name__)

PARTS = {"network": "denoiser.network", "conditioner": "conditioner", "first_stage": "first_stage"}
"""The names in init_parts, and the parts of a latent diffusion model that they mean."""


def weights_of(source: str, models: Mapping[str, Path], knob: str, kind: str) -> Package:
    """The weights that a knob names: a finished stage's, by its name, or those at a path, of any format.

    `kind` is "first_stage" (the package is the first stage's alone) or "diffusion". UserError where there is none.
    """
    path = models.get(source, Path(source))
    if not path.exists():
        raise UserError(
            f"{knob}={source}: that stage is not finished in this run, and no such path exists; run it first (add it "
            f"to stages), or give the path of a finished one ({knob}=outputs/NAME/TIME/STAGE), a diffusers folder or "
            "a .safetensors file"
        )
    package = read(path, kind=kind)
    for note in package.notes:
        log.warning("%s=%s: %s", knob, source, note)
    if package.kind != kind:
        raise UserError(f"{knob}={source}: it holds a first stage alone; give it as first_stage_from={source}")
    return package


# ------------------------------------------------------------------------------------------------- first stage


def inherit_first_stage(config: DictConfig, models: Mapping[str, Path]) -> Package | None:
    """Takes the first stage's architecture from the model that it will be loaded from."""
    if config.first_stage_from is None or _kind_of_task(config) == "first_stage":
        return None
    source = _first_stage_of(config, models)
    config.first_stage = OmegaConf.create(source.model)
    return source


def _kind_of_task(config: DictConfig) -> str:
    """What the stage's module will export, before it is built."""
    return str(getattr(locate(str(config.task._target_)), "kind", ""))


def load_first_stage(config: DictConfig) -> FirstStage:
    """The first stage that a second stage will train on, from `first_stage_from` or, failing that, `init_from`."""
    if config.first_stage_from is not None:
        source = _first_stage_of(config, {})
    elif config.init_from is not None:
        source = weights_of(config.init_from, {}, "init_from", "first_stage")
    else:
        raise UserError("first_stage_from: not given; the path of a finished first stage is needed")
    first_stage = cast(FirstStage, build(OmegaConf.create(source.model), "first_stage"))
    load_strictly(first_stage, source.state, source.origin)
    return first_stage.eval().requires_grad_(False)


def _first_stage_of(config: DictConfig, models: Mapping[str, Path]) -> Package:
    """What first_stage_from names. Where its file does not say the latents' statistics, they are those of the
    trained network (init_from), else the configured ones."""
    source = weights_of(config.first_stage_from, models, "first_stage_from", "first_stage")
    if source.has_latent_stats:
        return source
    init, channels = config.init_from, len(source.state["latent_mean"])
    statistics = {name: config.first_stage.get(name, source.model[name]) for name in STATISTICS}
    known_from = "configured (first_stage.latent_mean, first_stage.latent_std)"
    if init is not None and _takes(config, "network") and (init in models or Path(init).exists()):
        trained = weights_of(init, models, "init_from", "diffusion")
        statistics = {name: trained.state[f"first_stage.{name}"].tolist() for name in STATISTICS}
        known_from = f"of {trained.origin}"
    values = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in statistics.items()}
    if any(value.ndim and len(value) != channels for value in values.values()):
        return source  # the network is of other latents, which is refused when it is loaded
    values = {name: value.expand(channels).clone() for name, value in values.items()}
    log.warning(
        "%s does not say what its latents are normalised by: the values used are %s, mean %s, std %s",
        source.origin, known_from, *(_rounded(value) for value in values.values()),
    )  # fmt: skip
    model = source.model | {name: value.tolist() for name, value in values.items()}
    return replace(source, config={"model": model}, state=source.state | values, has_latent_stats=True)


# ---------------------------------------------------------------------------------------------------- loading


def load_weights(
    config: DictConfig, module: TrainingModule, models: Mapping[str, Path], first_stage: Package | None
) -> None:
    """Loads what first_stage_from and init_from name, of the latter the parts in init_parts; logs their origins.

    UserError where the weights do not fit, or were trained on latents of other statistics.
    """
    model = module.export_module
    _check_parts(config, module.kind)
    if first_stage is not None:
        load_strictly(cast(LatentDiffusion, model).first_stage, first_stage.state, first_stage.origin)
        log.info("first_stage: from %s (first_stage_from)", first_stage.origin)
    if config.init_from is None:
        return
    source = weights_of(config.init_from, models, "init_from", module.kind)
    if module.kind == "first_stage":
        load_strictly(model, source.state, source.origin)
        return
    model = cast(LatentDiffusion, model)
    if _takes(config, "network"):
        if first_stage is not None:
            _check_latents(model.first_stage, first_stage.origin, source)
        prediction = type(model.denoiser.prediction).__name__
        if source.prediction != prediction:
            log.warning(
                "the network in %s predicts %s, this configuration trains it to predict %s (prediction=...)",
                source.origin, source.prediction, prediction,
            )  # fmt: skip
    if _takes(config, "conditioner"):
        _check_tokens(model.conditioner, source)
    _load_parts(model, source, list(config.init_parts))


def _takes(config: DictConfig, part: str) -> bool:
    """Whether a part of the model, or a part of that, comes from init_from."""
    return any(str(name).split(".")[0] == part for name in config.init_parts or [])


def _check_parts(config: DictConfig, kind: str) -> None:
    """UserError for init_parts that do not exist, or that leave open where the first stage comes from."""
    if config.init_parts is None:
        return
    parts, first_stage = list(config.init_parts), config.first_stage_from
    if config.init_from is None or kind == "first_stage":
        raise UserError(f"init_parts={parts}: these are the parts that a second stage takes from init_from")
    for name in parts:
        if str(name).split(".")[0] not in PARTS:
            raise UserError(f"init_parts: there is no part {name!r}; {nearest(str(name), PARTS)}")
    if _takes(config, "first_stage") == (first_stage is not None):
        which = "neither names the" if first_stage is None else "both name a"
        raise UserError(
            f"init_parts={parts}, first_stage_from={first_stage}: {which} first stage; one of the two has to"
        )


def _load_parts(model: nn.Module, source: Package, parts: Sequence[str]) -> None:
    """Loads parts of a model (`network`, `conditioner.conditioners.0`) from a file; the others stay as they are."""
    places = ["".join([PARTS[name.split(".")[0]], *(f".{part}" for part in name.split(".")[1:])]) for name in parts]
    prefixes = tuple(f"{place}." for place in places)
    for name, prefix in zip(parts, prefixes, strict=True):
        if "." in name and not any(key.startswith(prefix) for key in source.state):
            raise UserError(f"init_parts: {source.origin} has no weights of {name!r}")
    chosen = {name: tensor for name, tensor in source.state.items() if name.startswith(prefixes)}
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}
    load_into(model, chosen | kept, source.origin)
    for place in places:
        note_origin(model.get_submodule(place), source.origin)
    log.info("%s: from %s (init_from)", ", ".join(parts), source.origin)
    if any(
        name.startswith("conditioner.") and _differs(tensor, source.state.get(name)) for name, tensor in kept.items()
    ):
        log.warning("conditioner: its weights are as configured, not those of %s (init_parts)", source.origin)


def _differs(own: Tensor, other: Tensor | None) -> bool:
    return other is None or own.shape != other.shape or not torch.equal(own.cpu(), other.to(own.dtype))


def _check_tokens(conditioner: nn.Module, source: Package) -> None:
    """UserError where a text encoder was trained with other numbers for the words than it would be given."""
    tokenizers = [part.tokenizer for part in conditioner.modules() if isinstance(part, TextConditioner)]
    if len(tokenizers) != len(source.tokenizers):
        return  # a file that brings none; those of the hub are known by their names
    for tokenizer, files in zip(tokenizers, source.tokenizers, strict=True):
        now, then = tokenizer.get_vocab(), vocabulary(files) if files else {}
        other = next((word for word in then if now.get(word, then[word]) != then[word]), None)
        if other is not None:
            raise UserError(
                f"the text encoder in {source.origin} was trained with another tokenizer ({other!r} is {then[other]} "
                f"there, {now[other]} here), so it would read other words. Give its tokenizer (tokenizer_path=FOLDER, "
                "or conditioner.tokenizer.name_or_path=FOLDER), or leave the conditioner out of init_parts"
            )


def _check_latents(first_stage: FirstStage, origin: str, trained: Package) -> None:
    """Raises UserError where a network was trained on latents of other channels or statistics than these."""
    for name in STATISTICS:
        own, theirs = getattr(first_stage, name).cpu(), trained.state[f"first_stage.{name}"].cpu()
        if own.shape != theirs.shape:
            raise UserError(
                f"the network in {trained.origin} was trained on latents of {len(theirs)} channels, the first stage in "
                f"{origin} has {len(own)}: they do not fit. Train a new network on it (init_from=null), or give "
                "the first stage that it was trained with"
            )
        if not torch.allclose(own, theirs, rtol=1e-2, atol=1e-2):
            raise UserError(
                f"the network in {trained.origin} was trained on latents whose {name} is "
                f"{_rounded(theirs)}, that of the first stage in {origin} is {_rounded(own)}: it would see other "
                "latents. Train a new one on them (init_from=null), or give the first stage that it was trained with"
            )


def _rounded(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values.tolist()) + "]"


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Loads a state; UserError that lists what is missing, unexpected or of another shape, and nothing is loaded."""
    load_into(module, state, origin)
    note_origin(module, origin)
