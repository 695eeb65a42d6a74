"""A picture beside the latent, as channels: a small one for super-resolution, one with a hole for inpainting."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.condition import Condition
from ldm.conditioning.text import Conditioner, Encode, Fields
from ldm.errors import UserError
from ldm.randomness import fold, uniform


class LowResolution(Conditioner):
    """`concat` [B, 3, H / factor, W / factor]: the picture made `factor` times smaller, which is the latent's size.

    The means of factor x factor pixels of the batch's `image` [B, 3, H, W] in [-1, 1]. Source: Rombach et al.
    2022, section 4.4 (super-resolution by concatenation).
    """

    def __init__(self, factor: int = 4) -> None:
        super().__init__()
        self.factor = factor

    def concat_channels(self, latent_channels: int) -> int:
        """Those of a picture."""
        return 3

    def forward(self, fields: Fields, keys: Tensor | None = None) -> Condition:
        """The small pictures, see Conditioner.forward; nothing is drawn."""
        return Condition(concat=F.avg_pool2d(_picture(fields, "image"), self.factor))

    def empty(self, n: int) -> Condition:
        """UserError: there is no picture that says nothing."""
        raise _no_empty_condition()


class MaskedImage(Conditioner):
    """`concat` [B, C + 1, h, w]: the first stage's latents of the picture with a hole, and the mask.

    Of the batch's `image` [B, 3, H, W] in [-1, 1] and `mask` [B, 1, H, W], 1 where the model is to paint. In
    training the mask is a rectangle drawn from the keys, each side uniform in [0.25, 1] of the picture's;
    without keys and mask all is masked. The hole is 0 (mid grey) before encoding.

    mask_first   the mask before the latents (SD inpainting) or after them (LDM's inpainting)
    """

    def __init__(self, mask_first: bool = True) -> None:
        super().__init__()
        self.mask_first = mask_first
        self._encode: Encode | None = None

    def bind(self, encode: Encode) -> None:
        """Takes the first stage's `encode`."""
        self._encode = encode

    def concat_channels(self, latent_channels: int) -> int:
        """Those of the latents, and the mask."""
        return latent_channels + 1

    def forward(self, fields: Fields, keys: Tensor | None = None) -> Condition:
        """The masked latents, see Conditioner.forward; UserError where there is no picture, or no first stage."""
        if self._encode is None:
            raise UserError("a MaskedImage conditioner needs a first stage: use it in a LatentDiffusion, or bind() one")
        image = _picture(fields, "image")
        mask = _picture(fields, "mask") if "mask" in fields else _rectangles(image, keys)
        mask = mask.to(image)
        with torch.no_grad():
            latents = self._encode(image * (1.0 - mask))
        small = F.interpolate(mask, size=latents.shape[-2:], mode="nearest").to(latents)
        parts = [small, latents] if self.mask_first else [latents, small]
        return Condition(concat=torch.cat(parts, dim=1))

    def empty(self, n: int) -> Condition:
        """UserError: there is no picture that says nothing."""
        raise _no_empty_condition()


def _rectangles(image: Tensor, keys: Tensor | None) -> Tensor:
    """Masks [B, 1, H, W] float32: a rectangle each, drawn from keys [B]; all of it without keys."""
    n, _, height, width = image.shape
    if keys is None:
        return image.new_ones(n, 1, height, width)
    draws = uniform(fold(keys, "mask"), (4,)).to(image.device)
    inside = []
    for side, size_draw, place_draw in ((height, draws[:, 0], draws[:, 1]), (width, draws[:, 2], draws[:, 3])):
        length = (0.25 + 0.75 * size_draw) * side
        start = place_draw * (side - length)
        at = torch.arange(side, device=image.device) + 0.5
        inside.append((at >= start[:, None]) & (at < (start + length)[:, None]))  # [B, side]
    return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(image.dtype)


def _picture(fields: Fields, name: str) -> Tensor:
    value = fields.get(name)
    if not isinstance(value, Tensor):
        raise UserError(
            f"this conditioner needs the field {name!r}, a picture as tensor [B, C, H, W]; there are: "
            f"{', '.join(fields) or 'no fields'}. Where captions alone are at hand (sheets of samples in training) "
            "leave it out: samples.every_n_steps=null"
        )
    return value


def _no_empty_condition() -> UserError:
    return UserError("a picture beside the latent has no empty condition; guide without it (guidance_scale=1)")
