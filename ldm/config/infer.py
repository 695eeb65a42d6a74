"""What the parts of a model have to agree on, read from their configuration before any of them is built."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from transformers import CLIPTextConfig

from ldm.conditioning.classes import ClassConditioner
from ldm.conditioning.compose import Compose, Unconditional
from ldm.conditioning.condition import Widths
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.image import LowResolution, MaskedImage
from ldm.conditioning.micro import MicroConditioner
from ldm.conditioning.text import TextConditioner
from ldm.config.check import build, locate
from ldm.data.loading.fetch import View
from ldm.errors import UserError
from ldm.latent_diffusion import check_latents, check_widths
from ldm.networks.unet import UNet


def fits(what: str, _root_: DictConfig) -> Any:
    """The value of `${fits:WHAT}`: that of an argument which depends on another part of the model.

    Of a network: in_channels, out_channels, context_dim, vector_dim, as the first stage and the conditioner give
    them (None where it cannot be known before the conditioner is built).
    """
    first_stage = _root_.first_stage
    latents = int(first_stage.latent_channels)
    if what == "out_channels":
        return latents
    widths = planned_widths(_root_.conditioner, latents) or Widths()
    found = {
        "in_channels": latents + widths.concat,
        "context_dim": widths.tokens or None,
        "vector_dim": widths.vector or None,
    }
    return found[what]


def planned_widths(node: DictConfig, latent_channels: int) -> Widths | None:
    """The widths of the conditions that a conditioner's configuration will give; None where it does not tell."""
    try:
        target = locate(str(node["_target_"]))
        if not (isinstance(target, type) and issubclass(target, Conditioner)):
            return None
        if not issubclass(target, Compose):
            return _widths_before_building(target, node, latent_channels)
        parts = [planned_widths(part, latent_channels) for part in node["conditioners"]]
    except (KeyError, TypeError, UserError, OmegaConfBaseException):  # `check` will say what is wrong with it
        return None
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    joined = Widths(*map(sum, zip(*known, strict=True)))
    return joined._replace(tokens=max(part.tokens for part in known)) if node.get("join") == "sequence" else joined


def _widths_before_building(target: type[Conditioner], node: DictConfig, latent_channels: int) -> Widths | None:
    """The widths of the shipped conditioners that are not built yet; None where they are not known."""
    if issubclass(target, ClassConditioner):
        return Widths(tokens=int(node["dim"]))
    if issubclass(target, MicroConditioner):
        return Widths(vector=int(node.get("channels", 256)) * len(node["default"]))
    if issubclass(target, LowResolution):
        return Widths(concat=3)
    if issubclass(target, MaskedImage):
        return Widths(concat=latent_channels + 1)
    if not issubclass(target, TextConditioner):
        return Widths() if issubclass(target, Unconditional) else None
    projection, pooled = node.get("projection"), bool(node.get("pooled"))
    width, vector = _text_width(node["encoder"]), _text_width(projection or node["encoder"], projection is not None)
    return None if width is None or (pooled and vector is None) else Widths(width, vector if pooled and vector else 0)


def _text_width(node: DictConfig, projected: bool = False) -> int | None:
    if "hidden_size" in node:
        return int(node.get("projection_dim", node["hidden_size"]) if projected else node["hidden_size"])
    name = str(node.get("name_or_path"))
    published = {"clip-vit-large": 768, "CLIP-ViT-H-14": 1024, "CLIP-ViT-bigG": 1280, "t5-v1_1-xxl": 4096}
    hub = next((width for part, width in published.items() if part in name), None)
    if hub is not None and not Path(name).exists():
        return hub
    try:
        config, _ = CLIPTextConfig.get_config_dict(name, subfolder=str(node.get("subfolder") or ""))
    except (OSError, ValueError):
        return None
    return int(config.get("projection_dim", 512) if projected else config.get("text_config", config)["hidden_size"])


def check_fits(config: DictConfig, stages: Collection[str]) -> None:
    """Raises UserError where a stage's parts do not fit: sizes, levels, heads, and the widths they give each other.

    They are built without memory for it. `stages` are those that a first stage may come from; what cannot be known
    beforehand (another model's latents, an encoder that is not at hand) is compared when the parts are built.
    """
    first_stage, network = (_without_memory(config[part], part) for part in ("first_stage", "network"))
    own = config.first_stage_from is None or config.first_stage_from in stages or config.task == "first_stage"
    if own and config.data.buckets is None:
        first_stage.check_size(*View.of(config.data.size).size)
    if config.task == "first_stage" or not isinstance(network, UNet):
        return
    _check_pictures(config)
    widths = planned_widths(config.conditioner, first_stage.latent_channels)
    if widths is None:
        return
    if own:
        check_latents(network, first_stage.latent_channels, widths)
    check_widths(network, widths)


def _check_pictures(config: DictConfig) -> None:
    """Raises UserError where a conditioner is to see pictures, and the stage's batches or sheets have none."""
    shown = [part for part in _classes(config.conditioner) if part.needs_image]
    if shown and config.latents is not None:
        raise UserError(
            f"latents={config.latents}: the conditioner ({shown[0].__name__}) is shown the pictures themselves, which "
            "cached latents do not have; train from pictures (latents=null)"
        )
    if any(not part.sees_mask for part in shown) and config.samples.every_n_steps is not None:
        raise UserError(
            f"samples.every_n_steps={config.samples.every_n_steps}: the conditioner ({shown[0].__name__}) makes "
            "nothing of a prompt alone, so there are no sheets of samples; give samples.every_n_steps=null"
        )


def _classes(node: DictConfig) -> list[type[Conditioner]]:
    """The conditioners that a configuration names, those of a composition one by one."""
    target = locate(str(node._target_))
    if not (isinstance(target, type) and issubclass(target, Conditioner)):
        return []
    if not issubclass(target, Compose):
        return [target]
    return [found for part in node.conditioners for found in _classes(part)]


def _without_memory(node: DictConfig, path: str) -> Any:
    """The object that a configuration describes, on the meta device; UserError where its constructor refuses."""
    try:
        with torch.device("meta"):
            return build(node, path)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
