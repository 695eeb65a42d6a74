"""How well a first stage keeps a picture."""

import torch
from torch import Tensor


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B]; both [B, 3, H, W] in [0, 1] (peak 1)."""
    mean_square = (images.float() - target.float()).square().flatten(1).mean(1)
    return -10.0 * torch.log10(mean_square.clamp(min=1e-10))
