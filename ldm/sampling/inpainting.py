"""Inpainting with a model that was not trained for it: the known latents stay on their own path."""

import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.prediction import Denoised
from ldm.diffusion.schedule import Schedule
from ldm.sampling.guidance import from_x0


def inpaint(denoise: Denoise, known: Tensor, mask: Tensor, schedule: Schedule) -> Denoise:
    """A `denoise` that returns the known data where `mask` [B, 1, h, w] is 0, and estimates where it is 1.

    Blended latent diffusion (Avrahami et al. 2022, algorithm 1) replaces the known part by the noised picture after
    each step. Here the estimate of the known part is the picture itself, `known` [B, C, h, w]: a sampler that starts
    there with the noised picture then stays on its path by its own formula, whatever its order and however many
    steps it looks back, and the network sees the picture at the level of each step.
    """

    def blended(z: Tensor, t: Tensor) -> Denoised:
        estimate, data = denoise(z, t), from_x0(known, z, t, schedule)
        return Denoised(data.x0.lerp(estimate.x0, mask), data.eps.lerp(estimate.eps, mask))

    return blended


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """The latents [B, 1, h, w] to repaint for a mask [B, 1, H, W] in [0, 1]: 1 where any of their pixels is."""
    return (F.max_pool2d(mask, factor) >= 0.5).to(mask.dtype)
