"""The convolutional blocks that the UNet, the encoder and the decoder share."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError

T = TypeVar("T", int, bool)
Resize = Callable[[Tensor, tuple[int, int] | None], Tensor]
"""Changes the resolution of [B, C, h, w]; doubling takes the (height, width) to reach."""


def zero_(module: nn.Module) -> None:
    """Sets every parameter of a module to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def group_norm(channels: int, groups: int = 32, eps: float = 1e-5) -> nn.GroupNorm:
    """A GroupNorm of the largest number of groups that divides both `groups` and `channels`.

    32 for every width of the published models; narrow models (48, 96, ...) get fewer groups.
    """
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=eps)


def per_level(value: T | Sequence[T], levels: int, name: str) -> tuple[T, ...]:
    """`value` once per level: a single number is repeated, a sequence has to have the right length."""
    if not isinstance(value, Sequence):
        return (value,) * levels
    if len(value) != levels:
        raise UserError(f"{name}={list(value)} has {len(value)} entries; channel_mult has {levels} levels")
    return tuple(value)


def sinusoidal_embedding(t: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """Embedding [B, channels] of network times t [B], float32: cosines first, then sines.

    The frequencies are max_period^(-i / half), i = 0 .. half - 1 (Ho et al. 2020, as in LDM; diffusers
    calls it flip_sin_to_cos=True, freq_shift=0). An odd number of channels ends with a zero.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = t.to(torch.float32)[:, None] * torch.exp(-math.log(max_period) * exponent)[None, :]
    embedding = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)  # [B, 2 half]
    return F.pad(embedding, (0, channels - 2 * half)) if channels % 2 else embedding


class ResBlock(nn.Module):
    """A residual block of two 3x3 convolutions, with an embedding [B, E] added in between.

    With `use_scale_shift_norm` the embedding gives a scale and a shift for the second norm instead (AdaGN, Dhariwal
    and Nichol 2021). The embedding comes with its SiLU already applied, once for all blocks. The first
    stage uses the block without an embedding (`emb_channels=None`). `resize` changes the resolution of
    both branches, before the first convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        dropout: float = 0.0,
        groups: int = 32,
        eps: float = 1e-5,
        resize: Resize | None = None,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resize = resize
        self.norm_1 = group_norm(in_channels, groups, eps)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb: nn.Linear | None = None
        if emb_channels is not None:
            self.emb = nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        self.norm_2 = group_norm(out_channels, groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """[B, C_in, h, w] to [B, C_out, h, w]; with `resize`, to its resolution (`size` where it takes one)."""
        h = F.silu(self.norm_1(x))
        if self.resize is not None:
            h, x = self.resize(h, size), self.resize(x, size)
        h = self.conv_1(h)
        if self.emb is None or emb is None:
            h = self.norm_2(h)
        elif self.use_scale_shift_norm:
            scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + self.emb(emb)[:, :, None, None])
        h = self.conv_2(self.dropout(F.silu(h)))
        out: Tensor = self.skip(x) + h
        return out


def halve(x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """[B, C, h, w] to [B, C, ceil(h/2), ceil(w/2)]: the mean of each 2x2 pixels; `size` is not used."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def double(x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """[B, C, h, w] to [B, C, *size], by default twice as high and wide: nearest neighbours."""
    return F.interpolate(x, size=size or (2 * x.shape[-2], 2 * x.shape[-1]), mode="nearest")


class Downsample(nn.Module):
    """Halves the resolution by a 3x3 convolution of stride 2.

    The UNet pads one pixel on each side; the autoencoder (`asymmetric`) pads right and bottom only.
    """

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """[B, C, h, w] to [B, C, ceil(h/2), ceil(w/2)] (floor when asymmetric); `emb` is not used."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
        return out


class Upsample(nn.Module):
    """Doubles the resolution (or goes to `size`) by nearest neighbours, followed by a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """[B, C, h, w] to [B, C, *size], by default twice as high and wide; `emb` is not used."""
        out: Tensor = self.conv(double(x, size))
        return out
