"""A trained second stage read back: its configuration, its weights, what it reads and how it is sampled from."""

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from ldm.config.check import build, build_on_meta, check, locate
from ldm.config.devices import pick_device
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError, listed
from ldm.first_stage.autoencoder import FirstStage
from ldm.generation import SamplingSettings
from ldm.interop.model_folder import ModelFolder, find_model_folder
from ldm.latent_diffusion import LatentDiffusion

log = logging.getLogger(__name__)

SAMPLING = ("sampler", "grid", "guidance", "steps", "guidance_scale")
"""The keys of a model's `sampling` node."""
NODES = ("sampler", "grid", "guidance")

# ------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Trained:
    """A trained second stage, ready to sample from, and where it came from."""

    model: LatentDiffusion
    folder: ModelFolder
    config: DictConfig


def open_trained(checkpoint: str) -> tuple[ModelFolder, DictConfig]:
    """The folder and the configuration of the model that `checkpoint` means; its weights are not read.

    UserError where there is none, or where its configuration does not describe the model.
    """
    folder = find_model_folder(Path(checkpoint), "diffusion")
    config = cast(DictConfig, OmegaConf.create(folder.config_text))
    if config.get("model") is None or OmegaConf.select(config, "data.size") is None:
        raise UserError(
            f"{folder.path}/config.yaml has no model or no data.size: it was written by an older version; train the "
            "stage or convert the model again"
        )
    return folder, config


def load_trained(checkpoint: str, weights: str, device: str) -> Trained:
    """The latent diffusion model of a run, a stage or a model folder, in eval mode on `device`.

    `weights` is "ema" or "raw". UserError where a file is damaged or does not fit the configuration.
    """
    folder, config = open_trained(checkpoint)
    folder.verify()
    if folder.tokenizer is not None:
        _use_tokenizer(config.model, str(config.tokenizer_path), str(folder.tokenizer))
    model = cast(LatentDiffusion, build(config.model, "model"))
    load_into(model, folder.weights(weights), str(folder.path))
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(model.to(pick_device(device)), folder, config)


def load_into(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a state; UserError that lists what is missing, unexpected or of another shape, and nothing is loaded."""
    expected = module.state_dict()
    wrong = [f"missing {name}" for name in expected if name not in state]
    wrong += [f"unexpected {name}" for name in state if name not in expected]
    wrong += [
        f"{name}: {list(state[name].shape)} in the file, {list(expected[name].shape)} in the model"
        for name in expected
        if name in state and expected[name].shape != state[name].shape
    ]
    if wrong:
        raise UserError(f"the weights in {origin} don't fit the model: {listed(wrong)}")
    module.load_state_dict(state)


def _use_tokenizer(node: Any, path: str, folder: str) -> None:
    """Replace the path of the training run's tokenizer by the model folder's, wherever it stands in a configuration."""
    keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        if OmegaConf.is_config(node[key]):
            _use_tokenizer(node[key], path, folder)
        elif node[key] == path:
            node[key] = folder
            if key == "path" and "captions" in node:
                node["captions"] = []  # the tokenizer exists: the training captions are not read


# -------------------------------------------------------------------------------------------- what it is given


@dataclass(frozen=True)
class ModelInputs:
    """What a picture is made from: the names of the texts that the conditioner reads, and whether it needs a picture.

    `needs_image` is that of super-resolution; an inpainting model, which sees a mask, paints everything without one.
    """

    texts: tuple[str, ...]
    needs_image: bool


def model_inputs(config: DictConfig) -> ModelInputs:
    """The inputs of the model with this configuration; nothing is built.

    A conditioner reads a text where its constructor has an argument `field`, the text's name, and no `default`.
    """
    texts, needs_image = [], False
    for node in _conditioners(config.model.conditioner):
        target = locate(str(node._target_))
        parameters = inspect.signature(target).parameters
        if "field" in parameters and "default" not in parameters:
            texts.append(str(node.get("field", parameters["field"].default)))
        needs_image |= getattr(target, "needs_image", False) is True and not getattr(target, "sees_mask", False)
    return ModelInputs(tuple(dict.fromkeys(texts)), needs_image)


def _conditioners(node: DictConfig) -> Iterator[DictConfig]:
    """The conditioners that a configuration names: itself, or the parts of a composition one by one."""
    lists = [node[name] for name in node if isinstance(node[name], ListConfig)]
    parts = [part for values in lists for part in values if isinstance(part, DictConfig) and "_target_" in part]
    if not parts:
        yield node
    for part in parts:
        yield from _conditioners(part)


def warn_without_dropout(config: DictConfig, scales: Iterable[float]) -> None:
    """Log a warning where a model is guided whose training never dropped its texts, or which reads none."""
    if all(scale == 1 for scale in scales):
        return
    nodes = list(_conditioners(config.model.conditioner))
    if not model_inputs(config).texts:
        log.warning("guidance: this model reads no text; guidance_scale has an effect with guidance=autoguidance alone")
    elif not any(node.get("dropout") for node in nodes):
        log.warning(
            "guidance: this model was trained without caption dropout (conditioner.dropout), so it has not learned "
            "the unconditional embedding: use guidance_scale=1, or train with conditioner.dropout=0.1"
        )


def image_size(config: DictConfig, size: int | Sequence[int] | None) -> tuple[int, int]:
    """(height, width) in pixels: of a number or [height, width]; None is the size that the model was trained at."""
    value = config.data.size if size is None else size
    sides = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"size={value}: expected a number of pixels or [height, width]")
    return sides[0], sides[1]


def trained_size(trained: Trained, size: int | Sequence[int] | None) -> tuple[int, int]:
    """`image_size`, which the first stage's factor has to divide (UserError)."""
    height, width = image_size(trained.config, size)
    trained.model.first_stage.check_size(height, width)
    return height, width


def untrained_parts(config: DictConfig) -> tuple[Schedule, FirstStage]:
    """The schedule and the first stage without weights: enough to check sizes and steps before anything is loaded."""
    first_stage = build_on_meta(config.model.first_stage, "model.first_stage")
    return build(config.model.denoiser.schedule, "model.denoiser.schedule"), first_stage


# ------------------------------------------------------------------------------------------ how it is sampled


def merge_sampling(default: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings as plain data: a `sampling` node, changed by a command's knobs.

    A null keeps the default. A node with a `_target_` replaces the default's (`sampler=ddim`), one without changes
    knobs of it (`sampler.eta=0.5`). UserError for an unknown knob, and for settings that neither has.
    """
    default = {} if default is None else default
    pairs = {name: (_plain(default.get(name)), _plain(changes.get(name))) for name in SAMPLING}
    merged = {name: old if new is None else _merge(old, new) for name, (old, new) in pairs.items()}
    for name in NODES:
        if isinstance(merged[name], dict) and "_target_" not in merged[name]:
            merged[name] = None
    missing = [f"{name}=..." for name in SAMPLING if merged[name] is None]
    if missing:
        raise UserError(
            "sampling: the model's config.yaml does not say how it is sampled from; give " + " ".join(missing)
        )
    for name in NODES:
        check(OmegaConf.create({name: merged[name]})[name], name)
    return merged


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)) or "_target_" in new:
        return new
    return old | {name: _merge(old.get(name), value) for name, value in new.items()}


def sampling_settings(sampling: Mapping[str, Any], strength: float = 1.0) -> SamplingSettings:
    """The objects of a `sampling` node; `strength` is img2img's."""
    return SamplingSettings(
        **{name: build(OmegaConf.create(_plain(sampling[name])), name) for name in NODES},
        steps=sampling["steps"],
        guidance_scale=float(sampling["guidance_scale"]),
        strength=strength,
    )
