"""The condition of an inpainting network: the picture without the part that is to be painted."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.randomness import fold, uniform

Encode = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [-1, 1] to latents [B, C, h, w]."""


class MaskedImage:
    """`concat` [B, 1 + C, h, w]: the mask, and the latents of the picture with the masked part grey.

    As in Stable Diffusion's inpainting model, whose UNet has 4 + 1 + 4 input channels. A latent counts as masked where
    any of its pixels is. In training a mask is a rectangle anywhere, its sides uniform from a quarter of the picture's
    to all of them, and with the probability `whole` everything, so that the model makes pictures from nothing too.
    """

    def __init__(self, whole: float = 0.25) -> None:
        if not 0.0 <= whole <= 1.0:
            raise UserError(f"masked_image.whole={whole}: expected a probability, 0 to 1")
        self.whole = whole

    def __call__(self, images: Tensor, masks: Tensor, encode: Encode) -> Tensor:
        """The channels for images [B, 3, H, W] in [-1, 1] and masks [B, 1, H, W], 1 where to paint."""
        hidden = (masks >= 0.5).to(images.dtype)
        latents = encode(images * (1.0 - hidden))
        factor = images.shape[-1] // latents.shape[-1]
        return torch.cat([F.max_pool2d(hidden, factor).to(latents), latents], dim=1)

    def draw(self, keys: Tensor, size: tuple[int, int]) -> Tensor:
        """Masks [B, 1, H, W] of a training step, from the samples' keys [B]."""
        u = uniform(fold(keys, "mask"), (5,))  # [B, 5]: whole or not, two sides, two places
        sides = torch.where(u[:, :1] < self.whole, 1.0, 0.25 + 0.75 * u[:, 1:3])  # [B, 2] shares of (H, W)
        starts = u[:, 3:5] * (1.0 - sides)
        inside = []
        for axis, length in enumerate(size):
            centres = (torch.arange(length, device=keys.device) + 0.5) / length
            first, last = starts[:, axis, None], (starts + sides)[:, axis, None]
            inside.append((centres >= first) & (centres <= last))  # [B, length]
        return (inside[0][:, :, None] & inside[1][:, None, :])[:, None].to(torch.float32)
