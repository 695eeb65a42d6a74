"""Widths that follow from other parts of a model: a network's `auto` channels, and whether the parts fit."""

from collections.abc import Collection
from typing import cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.conditioning.condition import Widths
from ldm.conditioning.conditioner import Conditioner
from ldm.config.check import build, build_on_meta
from ldm.data.loading.fetch import View
from ldm.diffusion.auxiliary import check_taps
from ldm.errors import UserError
from ldm.first_stage.autoencoder import FirstStage
from ldm.latent_diffusion import check_latents, check_widths
from ldm.networks.protocol import check_network

AUTO = "auto"
_widths: dict[str, tuple[Widths, bool, bool, str]] = {}  # of conditioners that were built, by their configuration


def fill_widths(config: DictConfig) -> None:
    """Puts the numbers in place of a network's `auto` widths, as the first stage and the conditioner give them.

    in_channels   the latents' channels, and those that the conditioner puts next to them
    out_channels  the latents' channels
    context_dim   the width of the tokens, None for none
    vector_dim    the width of the vector condition, None for none
    """
    network = config.get("network")
    if not isinstance(network, DictConfig) or AUTO not in [network[name] for name in network if name in FILLED]:
        return
    channels = int(config.first_stage.latent_channels)
    widths = conditioner_facts(config)[0]
    values = {
        "in_channels": channels + widths.concat,
        "out_channels": channels,
        "context_dim": widths.tokens or None,
        "vector_dim": widths.vector or None,
    }
    for name, value in values.items():
        if network.get(name) == AUTO:
            network[name] = value


FILLED = ("in_channels", "out_channels", "context_dim", "vector_dim")


def conditioner_facts(config: DictConfig) -> tuple[Widths, bool, bool, str]:
    """(widths, needs_image, sees_mask, name) of the conditioner that a configuration describes.

    It is built for it, once for each configuration, so that a custom one needs no second description, and an
    encoder that is not available is reported before anything trains. Random numbers are drawn as if it were not.
    """
    channels = int(config.first_stage.latent_channels)
    key = f"{channels} {OmegaConf.to_yaml(config.conditioner, resolve=True)}"
    if key not in _widths:
        with torch.random.fork_rng(devices=()):
            conditioner = cast(Conditioner, build(config.conditioner, "conditioner"))
        name = _name(conditioner)
        _widths[key] = (conditioner.widths(channels), conditioner.needs_image, conditioner.sees_mask, name)
    return _widths[key]


def _name(conditioner: Conditioner) -> str:
    """The class of a conditioner; of a composition, that of the part which needs a picture, if one does."""
    parts = [part for part in conditioner.modules() if isinstance(part, Conditioner)]
    return type(next((part for part in reversed(parts) if part.needs_image), conditioner)).__name__


def check_fit(config: DictConfig, stages: Collection[str]) -> None:
    """Raises UserError where a stage's parts do not fit: sizes, levels, heads, and the widths they give each other.

    First stage and network are built without memory for it. `stages` are those that a first stage may come from; the
    latents of another model are compared when the parts are loaded.
    """
    first_stage = cast(FirstStage, build_on_meta(config.first_stage, "first_stage"))
    configured = config.first_stage_from is None or config.first_stage_from in stages
    if configured and config.data.get("buckets") is None:
        first_stage.check_size(*View.of(config.data.size).size)
    if not refers_to(config, "network"):
        return
    network = build_on_meta(config.network, "network")
    check_network(network)
    _check_taps(config, network)
    widths, needs_image, sees_mask, name = conditioner_facts(config)
    if needs_image and config.latents is not None:
        raise UserError(
            f"latents={config.latents}: the conditioner ({name}) is shown the pictures, which cached latents do not "
            "have; train from pictures (latents=null)"
        )
    if needs_image and not sees_mask and (config.get("callbacks") or {}).get("images") is not None:
        raise UserError(
            f"callbacks.images: the conditioner ({name}) makes nothing of a prompt alone, so there are no sample "
            "images; give callbacks.images=null"
        )
    if configured:
        check_latents(network, first_stage.latent_channels, widths)
    check_widths(network, widths)


def refers_to(config: DictConfig, part: str) -> bool:
    """Whether a stage's task takes this part of the configuration (`${network}`)."""
    return f"${{{part}}}" in repr(OmegaConf.to_container(config.task, resolve=False))


def _check_taps(config: DictConfig, network: nn.Module) -> None:
    """UserError where an auxiliary loss taps what the network does not have."""
    terms = config.loss.get("auxiliary") if refers_to(config, "loss") else None
    for name, term in (terms or {}).items():
        try:
            check_taps(network, term.get("taps") or () if term is not None else ())
        except UserError as error:
            raise UserError(f"loss.auxiliary.{name}.{error}") from error
