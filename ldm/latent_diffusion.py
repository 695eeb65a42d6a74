"""The finished second stage as one module: denoiser, conditioner and first stage."""

import torch
from torch import Tensor, nn

from ldm.conditioning.text import Conditioner
from ldm.diffusion.denoiser import Denoiser
from ldm.first_stage.autoencoder import FirstStage
from ldm.randomness import fold, normal


class LatentDiffusion(nn.Module):
    """Latent diffusion (Rombach et al. 2022): what a second-stage checkpoint holds. The first stage is frozen."""

    def __init__(self, denoiser: Denoiser, conditioner: Conditioner, first_stage: FirstStage) -> None:
        super().__init__()
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
