"""The finished second stage as one module: denoiser, conditioner and first stage."""

from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.conditioning.condition import Widths
from ldm.conditioning.text import Conditioner
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.first_stage.autoencoder import FirstStage
from ldm.networks.unet import UNet
from ldm.randomness import fold, normal


class NetworkWidths(Protocol):
    """What a UNet, or its configuration, says of its inputs."""

    in_channels: int
    out_channels: int
    context_dim: int | None
    vector_dim: int | None


class LatentDiffusion(nn.Module):
    """Latent diffusion (Rombach et al. 2022): what a second-stage checkpoint holds. The first stage is frozen.

    Raises UserError where the network does not have the latents' channels, or not the widths of the conditions.
    """

    def __init__(self, denoiser: Denoiser, conditioner: Conditioner, first_stage: FirstStage) -> None:
        super().__init__()
        network, channels = denoiser.network, first_stage.latent_channels
        if isinstance(network, UNet):
            check_latents(network, channels, conditioner.widths(channels))
            check_widths(network, conditioner.widths(channels))
        conditioner.bind(first_stage.encode)
        self.denoiser = denoiser
        self.conditioner = conditioner
        self.first_stage = first_stage.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Training mode for all but the first stage, which stays frozen in eval mode."""
        super().train(mode)
        self.first_stage.eval()
        return self

    @torch.no_grad()
    def latents(self, images: Tensor, rng_keys: Tensor) -> Tensor:
        """Normalised latents z0 [B, C, h, w] of images [B, 3, H, W] in [-1, 1], a sample of the posterior.

        The sample is drawn from `rng_keys` [B], so it is a fresh one at each visit.
        """
        factor = self.first_stage.factor
        shape = (self.first_stage.latent_channels, images.shape[2] // factor, images.shape[3] // factor)
        return self.first_stage.encode(images, normal(fold(rng_keys, "posterior"), shape))

    def sample_from_moments(self, moments: Tensor, rng_keys: Tensor) -> Tensor:
        """The same of moments [B, 2, C, h, w] that the first stage made beforehand; the sample is a fresh one too."""
        mean, std = moments.to(torch.float32).unbind(1)
        return mean + std * normal(fold(rng_keys, "posterior"), tuple(mean.shape[1:]))


def check_latents(network: NetworkWidths, latent_channels: int, widths: Widths) -> None:
    """Raises UserError where the network is for other channels than the latents and what stands beside them have."""
    wanted = latent_channels + widths.concat, latent_channels
    if (network.in_channels, network.out_channels) != wanted:
        raise UserError(
            f"the first stage has latents of {latent_channels} channels and the conditioner puts {widths.concat} "
            f"beside them; the network has in_channels={network.in_channels}, out_channels={network.out_channels}. "
            f"Give network.in_channels={wanted[0]} network.out_channels={wanted[1]}, or another first stage"
        )


def check_widths(network: NetworkWidths, widths: Widths) -> None:
    """Raises UserError where the network is for tokens or a vector of other widths than the conditioner gives."""
    rows = ("tokens", widths.tokens, "context_dim"), ("a vector", widths.vector, "vector_dim")
    for what, width, name in rows:
        own = getattr(network, name)
        if (own or 0) != width:
            given = f"gives {what} of {width} numbers" if width else f"gives no {what.removeprefix('a ')}"
            raise UserError(
                f"the conditioner {given}, the network has {name}={own}. Give network.{name}={width or 'null'}, or "
                "another conditioner"
            )
