"""The finished second stage as one module: denoiser, conditioner and first stage."""

import torch
from torch import Tensor, nn

from ldm.conditioning.text import Conditioner
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.first_stage.autoencoder import FirstStage
from ldm.networks.unet import UNet
from ldm.randomness import fold, normal


class LatentDiffusion(nn.Module):
    """Latent diffusion (Rombach et al. 2022): what a second-stage checkpoint holds. The first stage is frozen.

    Raises UserError where the network does not have the latents' channels, or not the widths of the conditions.
    """

    def __init__(self, denoiser: Denoiser, conditioner: Conditioner, first_stage: FirstStage) -> None:
        super().__init__()
        _check_widths(denoiser.network, conditioner, first_stage.latent_channels)
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
    def latents(self, images: Tensor, keys: Tensor) -> Tensor:
        """Normalised latents z0 [B, C, h, w] of images [B, 3, H, W] in [-1, 1], a sample of the posterior.

        The sample is drawn from `keys` [B], so it is a fresh one at each visit.
        """
        factor = self.first_stage.factor
        shape = (self.first_stage.latent_channels, images.shape[2] // factor, images.shape[3] // factor)
        return self.first_stage.encode(images, normal(fold(keys, "posterior"), shape))

    def drawn_latents(self, moments: Tensor, keys: Tensor) -> Tensor:
        """The same of moments [B, 2, C, h, w] that the first stage made beforehand; the sample is a fresh one too."""
        mean, std = moments.to(torch.float32).unbind(1)
        return mean + std * normal(fold(keys, "posterior"), tuple(mean.shape[1:]))


def _check_widths(network: nn.Module, conditioner: Conditioner, latent_channels: int) -> None:
    if not isinstance(network, UNet):
        return
    tokens, vector, beside = conditioner.widths(latent_channels)
    wanted = latent_channels + beside, latent_channels
    if (network.in_channels, network.out_channels) != wanted:
        raise UserError(
            f"the first stage has latents of {latent_channels} channels and the conditioner puts {beside} beside them; "
            f"the network has in_channels={network.in_channels}, out_channels={network.out_channels}. Give "
            f"network.in_channels={wanted[0]} network.out_channels={wanted[1]}, or another first stage"
        )
    for what, width, name in (("tokens", tokens, "context_dim"), ("a vector", vector, "vector_dim")):
        own = getattr(network, name)
        if (own or 0) != width:
            given = f"gives {what} of {width} numbers" if width else f"gives no {what.removeprefix('a ')}"
            raise UserError(
                f"the conditioner {given}, the network has {name}={own}. Give network.{name}={width or 'null'}, or "
                "another conditioner"
            )
