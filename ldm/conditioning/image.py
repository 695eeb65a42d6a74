"""A picture beside the latent, as channels: a small one for super-resolution, one with a hole for inpainting."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.condition import Arguments, Condition, Widths
from ldm.conditioning.text import Conditioner, Encode, Fields
from ldm.errors import UserError
from ldm.randomness import fold, uniform


class LowResolution(Conditioner):
    """`concat` [B, 3, H / factor, W / factor]: the picture made `factor` times smaller, which is the latent's size.

    The means of factor x factor pixels of the batch's `image` [B, 3, H, W] in [-1, 1]. Source: Rombach et al.
    2022, section 4.4 (super-resolution by concatenation).
    """

    needs_image = True

    def __init__(self, factor: int = 4) -> None:
        super().__init__()
        self.factor = factor

    def widths(self, latent_channels: int) -> Widths:
        """The channels of a picture."""
        return self.planned({}, latent_channels)

    @classmethod
    def planned(cls, arguments: Arguments, latent_channels: int) -> Widths:
        """The same."""
        return Widths(concat=3)

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The small pictures, see Conditioner.forward; nothing is drawn."""
        return Condition(concat=F.avg_pool2d(_picture(fields, "image"), self.factor))

    def empty(self, n: int) -> Condition:
        """UserError: there is no picture that says nothing."""
        raise _no_empty_condition()


class MaskedImage(Conditioner):
    """`concat` [B, C + 1, h, w]: the first stage's latents of the picture with a hole, and the mask.

    Of the batch's `image` [B, 3, H, W] in [-1, 1] and `mask` [B, 1, H, W], 1 where the model is to paint. A latent
    counts as masked where any of its pixels is; the hole is 0 (mid grey) before encoding. In training the mask is
    a rectangle anywhere, drawn from the rng_keys, its sides uniform from a quarter of the picture's to all of them, and
    with the probability `whole` everything, so that the model makes pictures from nothing too. Without rng_keys and mask
    all is masked.

    mask_first   the mask before the latents (SD inpainting) or after them (LDM's inpainting)
    """

    sees_mask = True
    needs_image = True

    def __init__(self, mask_first: bool = True, whole: float = 0.25) -> None:
        super().__init__()
        if not 0.0 <= whole <= 1.0:
            raise UserError(f"whole={whole}: expected a probability, 0 to 1")
        self.mask_first = mask_first
        self.whole = whole
        self._encode: Encode | None = None

    def bind(self, encode: Encode) -> None:
        """Takes the first stage's `encode`."""
        self._encode = encode

    def widths(self, latent_channels: int) -> Widths:
        """The channels of the latents, and the mask."""
        return self.planned({}, latent_channels)

    @classmethod
    def planned(cls, arguments: Arguments, latent_channels: int) -> Widths:
        """The same."""
        return Widths(concat=latent_channels + 1)

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The masked latents, see Conditioner.forward; UserError where there is no picture, or no first stage."""
        if self._encode is None:
            raise UserError("a MaskedImage conditioner needs a first stage: use it in a LatentDiffusion, or bind() one")
        image = _picture(fields, "image")
        mask = _picture(fields, "mask") if "mask" in fields else self._drawn(image, rng_keys)
        hidden = (mask >= 0.5).to(image)
        with torch.no_grad():
            latents = self._encode(image * (1.0 - hidden))
        small = F.max_pool2d(hidden, image.shape[-1] // latents.shape[-1]).to(latents)
        parts = [small, latents] if self.mask_first else [latents, small]
        return Condition(concat=torch.cat(parts, dim=1))

    def empty(self, n: int) -> Condition:
        """UserError: there is no picture that says nothing."""
        raise _no_empty_condition()

    def _drawn(self, image: Tensor, rng_keys: Tensor | None) -> Tensor:
        """Masks [B, 1, H, W] drawn from rng_keys [B]; all of the picture without rng_keys."""
        n, _, height, width = image.shape
        if rng_keys is None:
            return image.new_ones(n, 1, height, width)
        u = uniform(fold(rng_keys, "mask"), (5,)).to(image.device)  # [B, 5]: whole or not, two sides, two places
        sides = torch.where(u[:, :1] < self.whole, 1.0, 0.25 + 0.75 * u[:, 1:3])  # [B, 2] shares of (H, W)
        starts = u[:, 3:5] * (1.0 - sides)
        inside = []
        for axis, length in enumerate((height, width)):
            centres = (torch.arange(length, device=image.device) + 0.5) / length
            first, last = starts[:, axis, None], (starts + sides)[:, axis, None]
            inside.append((centres >= first) & (centres <= last))  # [B, length]
        return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(image.dtype)


def _picture(fields: Fields, name: str) -> Tensor:
    value = fields.get(name)
    if not isinstance(value, Tensor):
        raise UserError(
            f"this conditioner needs the field {name!r}, a picture as tensor [B, C, H, W]; there are: "
            f"{', '.join(fields) or 'no fields'}. Train from pictures (latents=null), give one when sampling "
            "(init_image), and leave out sheets of samples in training (samples.every_n_steps=null)"
        )
    return value


def _no_empty_condition() -> UserError:
    return UserError("a picture beside the latent has no empty condition; guide without it (guidance_scale=1)")
