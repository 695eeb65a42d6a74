"""Where the weights to begin with come from: an earlier stage, a model of this project, or a file of another tool."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ldm.config.check import build
from ldm.errors import UserError
from ldm.first_stage.autoencoder import FirstStage
from ldm.interop.convert import read
from ldm.interop.diffusers_folder import is_diffusers
from ldm.interop.model_folder import find_model_folder
from ldm.interop.own_folder import first_stage_node
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.frozen import note_origin
from ldm.training.module import TrainingModule


@dataclass(frozen=True)
class Weights:
    """A model's state by our names, where it was read, and its first stage's configuration."""

    state: dict[str, Tensor]
    origin: str
    first_stage: dict[str, Any]


def weights_of(given: str, models: dict[str, Path], knob: str, kind: str) -> Weights:
    """The weights meant by a knob: of a finished stage, by its name, or at a path, of any format that can be read.

    `kind` is "first_stage" (the state is the first stage's alone) or "diffusion". UserError where there is none.
    """
    path = models.get(given, Path(given))
    if not path.exists():
        raise UserError(
            f"{knob}={given}: that stage is not finished in this run, and no such path exists; run it first (add it "
            f"to stages), or give the path of a finished one ({knob}=outputs/NAME/TIME/STAGE), a diffusers folder or "
            "a .safetensors file"
        )
    if not path.is_file() and not is_diffusers(path):
        folder = find_model_folder(path, kind)
        node = OmegaConf.to_container(cast(DictConfig, OmegaConf.create(folder.config_text)).first_stage)
        return Weights(folder.weights("ema"), str(folder.path), cast(dict[str, Any], node))
    package = read(path)
    if kind == "first_stage":
        return Weights(package.part("first_stage."), str(path), first_stage_node(package))
    if package.kind != kind:
        raise UserError(f"{knob}={given}: it holds a first stage alone; give it as first_stage_from={given}")
    return Weights(package.state, str(path), first_stage_node(package))


def inherit_first_stage(config: DictConfig, models: dict[str, Path]) -> Weights | None:
    """Takes the first stage's architecture from the model that it will be loaded from."""
    if config.first_stage_from is None or config.task == "first_stage":
        return None
    source = weights_of(config.first_stage_from, models, "first_stage_from", "first_stage")
    config.first_stage = OmegaConf.create(source.first_stage)
    config.tasks.diffusion.latent_diffusion.first_stage = config.first_stage
    return source


def load_weights(
    config: DictConfig, module: TrainingModule, models: dict[str, Path], first_stage: Weights | None
) -> None:
    """Loads what first_stage_from and init_from name; the first stage of the former counts.

    UserError where the weights do not fit, or were trained on latents of other statistics.
    """
    if first_stage is not None:
        target = cast(LatentDiffusion, module.model()).first_stage
        load_strictly(target, first_stage.state, first_stage.origin)
    if config.init_from is not None:
        source = weights_of(config.init_from, models, "init_from", module.kind)
        state = source.state
        if first_stage is not None:
            target = cast(LatentDiffusion, module.model()).first_stage
            _check_latents(target, first_stage.origin, source)
            own = {f"first_stage.{name}": tensor for name, tensor in target.state_dict().items()}
            state = {name: tensor for name, tensor in state.items() if not name.startswith("first_stage.")} | own
        load_strictly(module.model(), state, source.origin)
        if first_stage is not None:
            note_origin(target, first_stage.origin)


def load_first_stage(config: DictConfig) -> FirstStage:
    """The first stage that a second stage will train on, from `first_stage_from` or, failing that, `init_from`."""
    given = config.first_stage_from or config.init_from
    knob = "first_stage_from" if config.first_stage_from else "init_from"
    if given is None:
        raise UserError("first_stage_from: not given; the path of a finished first stage is needed")
    source = weights_of(given, {}, knob, "first_stage")
    first_stage = cast(FirstStage, build(OmegaConf.create(source.first_stage), "first_stage"))
    load_strictly(first_stage, source.state, source.origin)
    return first_stage.eval().requires_grad_(False)


def _check_latents(first_stage: FirstStage, origin: str, trained: Weights) -> None:
    """Raises UserError where a network was trained on latents of other channels or statistics than these."""
    for name in ("latent_mean", "latent_std"):
        own, theirs = getattr(first_stage, name).cpu(), trained.state[f"first_stage.{name}"].cpu()
        if own.shape != theirs.shape:
            raise UserError(
                f"the network in {trained.origin} was trained on latents of {len(theirs)} channels, the first stage in "
                f"{origin} has {len(own)}: they do not fit. Train the network anew on it (init_from=null), or give "
                "the first stage that it was trained with"
            )
        if not torch.allclose(own, theirs, rtol=1e-2, atol=1e-2):
            raise UserError(
                f"the network in {trained.origin} was trained on latents whose {name} is "
                f"{_told(theirs)}, that of the first stage in {origin} is {_told(own)}: it would see other latents. "
                "Train it anew on them (init_from=null), or give the first stage that it was trained with"
            )


def _told(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values.tolist()) + "]"


def load_strictly(module: torch.nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Loads a state; UserError that lists what is missing, unexpected or of another shape, and nothing is loaded."""
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in state]
    wrong += [f"unexpected {name}" for name in state if name not in own]
    wrong += [
        f"{name}: {list(state[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(f"the weights in {origin} don't fit the model: {'; '.join(wrong[:8])}{more}")
    module.load_state_dict(state)
    note_origin(module, origin)
