"""Inpainting with a model that was not trained for it: latents that are known stay on their own path."""

import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.prediction import Denoised
from ldm.diffusion.schedule import Schedule
from ldm.sampling.guidance import of_x0


def keeping(denoise: Denoise, known: Tensor, mask: Tensor, schedule: Schedule) -> Denoise:
    """A `denoise` that knows the data where `mask` [B, 1, h, w] is 0, and estimates them where it is 1.

    Blended latent diffusion (Avrahami et al. 2022, algorithm 1) puts the noised picture in place of the known part
    after each step. Here the estimate of the known part is the picture itself, `known` [B, C, h, w]: a sampler that
    begins there with the noised picture then stays on its path by its own formula, whatever its order and however
    many steps back it looks, and the network sees the picture at the level of each step.
    """

    def blended(z: Tensor, t: Tensor) -> Denoised:
        found, given = denoise(z, t), of_x0(known, z, t, schedule)
        return Denoised(given.x0.lerp(found.x0, mask), given.eps.lerp(found.eps, mask))

    return blended


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """Of a mask [B, 1, H, W] in [0, 1], which latents [B, 1, h, w] are made anew: 1 where any of their pixels is."""
    return (F.max_pool2d(mask, factor) >= 0.5).to(mask.dtype)
