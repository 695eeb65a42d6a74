"""A picture as channels next to the latent: a small one for super-resolution, one with a hole for inpainting."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.condition import Condition, Widths
from ldm.conditioning.conditioner import Conditioner, Fields, LatentEncoder, check_probability
from ldm.errors import UserError
from ldm.randomness import fold, uniform


class LowResolution(Conditioner):
    """`concat` [B, 3, h, w]: the batch's `image` [B, 3, H, W] in [-1, 1], averaged down to the latents' size.

    Source: Rombach et al. 2022, section 4.4 (super-resolution by concatenation).
    """

    needs_image = True

    def __init__(self) -> None:
        super().__init__()
        self.factor: int | None = None

    def bind(self, first_stage: LatentEncoder) -> None:
        """Take the first stage's downsampling factor."""
        self.factor = first_stage.factor

    def widths(self, latent_channels: int) -> Widths:
        """The channels of a picture."""
        return Widths(concat=3)

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The small pictures, see Conditioner.forward; nothing is drawn."""
        if self.factor is None:
            raise _unbound(self)
        return Condition(concat=F.avg_pool2d(_picture(fields, "image"), self.factor))


class MaskedImage(Conditioner):
    """`concat` [B, C + 1, h, w]: the first stage's latents of the picture with a hole, and the mask.

    Of the batch's `image` [B, 3, H, W] in [-1, 1] and `mask` [B, 1, H, W], 1 where the model is to paint. A latent
    counts as masked where any of its pixels is; the hole is 0 (mid grey) before encoding. In training the mask is
    drawn from the rng_keys: a rectangle at a uniform position, its sides uniform from a quarter of the picture's to
    all of them, and with the probability `whole` the entire picture, so that the model also generates without a
    picture. Without rng_keys and `mask` the entire picture is masked.

    mask_first   the mask before the latents (SD inpainting) or after them (LDM's inpainting)
    """

    sees_mask = True
    needs_image = True

    def __init__(self, mask_first: bool = True, whole: float = 0.25) -> None:
        super().__init__()
        check_probability("whole", whole)
        self.mask_first = mask_first
        self.whole = whole
        self._encode: Callable[[Tensor], Tensor] | None = None

    def bind(self, first_stage: LatentEncoder) -> None:
        """Take the first stage's `encode`."""
        self._encode = first_stage.encode

    def widths(self, latent_channels: int) -> Widths:
        """The channels of the latents, and the mask."""
        return Widths(concat=latent_channels + 1)

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The masked latents, see Conditioner.forward; UserError without a picture or a first stage."""
        if self._encode is None:
            raise _unbound(self)
        image = _picture(fields, "image")
        mask = _picture(fields, "mask") if "mask" in fields else self._random_mask(image, rng_keys)
        hidden = (mask >= 0.5).to(image)
        with torch.no_grad():
            latents = self._encode(image * (1.0 - hidden))
        small = F.max_pool2d(hidden, image.shape[-1] // latents.shape[-1]).to(latents)
        parts = [small, latents] if self.mask_first else [latents, small]
        return Condition(concat=torch.cat(parts, dim=1))

    def _random_mask(self, image: Tensor, rng_keys: Tensor | None) -> Tensor:
        """Masks [B, 1, H, W] drawn from rng_keys [B]; the entire picture without rng_keys."""
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
            f"this conditioner needs the field {name!r}, a picture as tensor [B, C, H, W]; the batch has: "
            f"{', '.join(fields) or 'no fields'}. Train from pictures (latents=null), give one when sampling "
            "(init_image), and leave out sheets of samples in training (samples.every_n_steps=null)"
        )
    return value


def _unbound(conditioner: Conditioner) -> UserError:
    return UserError(f"{type(conditioner).__name__} needs a first stage: use it in a LatentDiffusion, or bind() one")
