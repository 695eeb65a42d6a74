"""The finished second stage as one module: denoiser, conditioner and first stage."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.condition import Widths
from ldm.conditioning.conditioner import Conditioner
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.first_stage.autoencoder import FirstStage
from ldm.randomness import fold, normal


class LatentDiffusion(nn.Module):
    """Latent diffusion (Rombach et al. 2022): what a second-stage checkpoint holds. The first stage is frozen.

    Raises UserError where the network does not have the latents' channels, or not the widths of the conditions.
    """

    def __init__(self, denoiser: Denoiser, conditioner: Conditioner, first_stage: FirstStage) -> None:
        super().__init__()
        widths = conditioner.widths(first_stage.latent_channels)
        check_latents(denoiser.network, first_stage.latent_channels, widths)
        check_widths(denoiser.network, widths)
        conditioner.bind(first_stage)
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

        The sample is drawn from `rng_keys` [B], so each visit has another one.
        """
        factor = self.first_stage.factor
        shape = (self.first_stage.latent_channels, images.shape[2] // factor, images.shape[3] // factor)
        return self.first_stage.encode(images, normal(fold(rng_keys, "posterior"), shape))

    def sample_from_moments(self, moments: Tensor, rng_keys: Tensor) -> Tensor:
        """The same from the first stage's precomputed moments [B, 2, C, h, w]."""
        mean, std = moments.to(torch.float32).unbind(1)
        return mean + std * normal(fold(rng_keys, "posterior"), tuple(mean.shape[1:]))


def check_latents(network: Any, latent_channels: int, widths: Widths) -> None:
    """Raise UserError where a DenoisingNetwork does not have the channels of the latents and the condition's concat."""
    in_channels = latent_channels + widths.concat
    if (network.in_channels, network.out_channels) != (in_channels, latent_channels):
        raise UserError(
            f"the first stage has latents of {latent_channels} channels and the conditioner adds {widths.concat}; the "
            f"network has in_channels={network.in_channels}, out_channels={network.out_channels}. Give "
            f"network.in_channels={in_channels} network.out_channels={latent_channels}, or another first stage"
        )


def check_widths(network: Any, widths: Widths) -> None:
    """Raise UserError where a DenoisingNetwork is for tokens or a vector of other widths than the conditioner's."""
    rows = ("tokens", widths.tokens, "context_dim"), ("a vector", widths.vector, "vector_dim")
    for field, width, name in rows:
        network_width = getattr(network, name)
        if (network_width or 0) != width:
            gives = f"gives {field} of {width} numbers" if width else f"gives no {field.removeprefix('a ')}"
            raise UserError(
                f"the conditioner {gives}, the network has {name}={network_width}. Give network.{name}="
                f"{width or 'null'}, or another conditioner"
            )
