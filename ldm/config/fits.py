"""What the parts of a model have to agree on, read from their configuration before any of them is built."""

from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ldm.conditioning.compose import Compose
from ldm.conditioning.condition import Widths
from ldm.conditioning.text import Conditioner
from ldm.config.check import locate
from ldm.errors import UserError
from ldm.first_stage.bottleneck import Bottleneck
from ldm.latent_diffusion import check_latents, check_widths
from ldm.networks.unet import UNet


def fits(what: str, _root_: DictConfig) -> Any:
    """The value of `${fits:WHAT}`: that of an argument which depends on another part of the model.

    Of a network: in_channels, out_channels, context_dim, vector_dim, as the first stage and the conditioner give
    them (None where it cannot be known before the conditioner is built). Of a first stage's loss: bottleneck_weight,
    sum_values, as its bottleneck's models were trained. `factor`: how many times smaller the first stage's latents are.
    """
    first_stage = _root_.first_stage
    if what in ("bottleneck_weight", "sum_values"):
        bottleneck = locate(str(first_stage.bottleneck._target_))
        own = bottleneck if isinstance(bottleneck, type) and issubclass(bottleneck, Bottleneck) else Bottleneck
        return own.loss_weight if what == "bottleneck_weight" else own.sums_values
    if what == "factor":
        return 2 ** (len(first_stage.encoder.channel_mult) - 1)
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
            return target.planned(node, latent_channels)
        parts = [planned_widths(part, latent_channels) for part in node["conditioners"]]
    except (KeyError, TypeError, UserError, OmegaConfBaseException):  # `check` will say what is wrong with it
        return None
    known = [part for part in parts if part is not None]
    return Widths(*map(sum, zip(*known, strict=True))) if known and len(known) == len(parts) else None


def check_fits(config: DictConfig, stages: Collection[str]) -> None:
    """Raises UserError where a second stage's network is for other latents or conditions than it will be given.

    `stages` are those that a first stage may come from. What cannot be known before the parts are built (another
    model's latents, an encoder that is not at hand) is compared when they are.
    """
    network, given = config.network, config.first_stage_from
    if config.task == "first_stage" or locate(str(network._target_)) is not UNet:
        return
    channels = int(config.first_stage.latent_channels)
    widths = planned_widths(config.conditioner, channels)
    if widths is None:
        return
    if given is None or given in stages:
        check_latents(network, channels, widths)
    check_widths(network, widths)
