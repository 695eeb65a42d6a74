"""The finished second stage as one module: denoiser, conditioner and first stage."""

import torch
from torch import Tensor, nn

from ldm.conditioning.masked_image import MaskedImage
from ldm.conditioning.text import Conditioner
from ldm.diffusion.denoiser import Denoiser
from ldm.first_stage.autoencoder import FirstStage
from ldm.randomness import fold, normal


class LatentDiffusion(nn.Module):
    """Latent diffusion (Rombach et al. 2022): what a second-stage checkpoint holds. The first stage is frozen.

    With `masked_image` the network sees a masked picture beside the noisy latent, and paints the masked part.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioner: Conditioner,
        first_stage: FirstStage,
        masked_image: MaskedImage | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.conditioner = conditioner
        self.first_stage = first_stage.eval().requires_grad_(False)
        self.masked_image = masked_image

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Training mode for all but the first stage, which stays frozen in eval mode."""
        super().train(mode)
        self.first_stage.eval()
        return self

    @torch.no_grad()
    def seen(self, images: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """What an inpainting model is shown of images [B, 3, H, W] in training; nothing where it is none."""
        if self.masked_image is None:
            return {}
        masks = self.masked_image.draw(keys, (images.shape[2], images.shape[3]))
        return {"concat": self.masked_image(images, masks, self.first_stage.encode)}

    @torch.no_grad()
    def latents(self, images: Tensor, keys: Tensor) -> Tensor:
        """Normalised latents z0 [B, C, h, w] of images [B, 3, H, W] in [-1, 1], a sample of the posterior.

        The sample is drawn from `keys` [B], so it is a fresh one at each visit.
        """
        factor = self.first_stage.factor
        shape = (self.first_stage.latent_channels, images.shape[2] // factor, images.shape[3] // factor)
        return self.first_stage.encode(images, normal(fold(keys, "posterior"), shape))
