"""The convolutional encoder and decoder of the first stage."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.networks.attention import PixelAttention
from ldm.networks.blocks import Downsample, ResBlock, Upsample, group_norm, per_level

EPS = 1e-6  # of the group norms; the UNet's residual blocks have 1e-5


class Level(nn.Sequential):
    """Residual blocks at one resolution, each followed by attention where asked, then the resampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention: bool,
        resample: Downsample | Upsample | None,
        dropout: float,
        groups: int,
    ) -> None:
        super().__init__()
        for i in range(num_res_blocks):
            ins = out_channels if i else in_channels
            self.add_module(f"res_{i}", ResBlock(ins, out_channels, dropout=dropout, groups=groups, eps=EPS))
            if attention:
                self.add_module(f"attention_{i}", PixelAttention(out_channels, groups))
        if resample is not None:
            self.add_module("resample", resample)


class Middle(nn.Sequential):
    """Two residual blocks at the lowest resolution, with attention between them unless switched off."""

    def __init__(self, channels: int, attention: bool, dropout: float, groups: int) -> None:
        super().__init__()
        self.add_module("res_0", ResBlock(channels, channels, dropout=dropout, groups=groups, eps=EPS))
        if attention:
            self.add_module("attention_0", PixelAttention(channels, groups))
        self.add_module("res_1", ResBlock(channels, channels, dropout=dropout, groups=groups, eps=EPS))


class Encoder(nn.Module):
    """Features [B, out_channels, H / factor, W / factor] of images [B, in_channels, H, W].

    Args:
        in_channels: of the image, 3.
        channels: width of the first level; level i has channels * channel_mult[i].
        channel_mult: one factor per level; each further level halves the resolution.
        num_res_blocks: residual blocks per level, a number or one per level.
        out_channels: latent channels, twice as many before a KL regularizer (mean and log variance).
        mid_attention: whether the middle has self-attention.
        attention_levels: which levels have self-attention after each block; None for no level.
        dropout: in the residual blocks.
        groups: of the group norms; the greatest common divisor with the channels is taken.

    Source: Rombach et al. 2022 (LDM), `Encoder` in its `diffusionmodules.model`. SD's KL-f8 is
    `Encoder(3, 128, (1, 2, 4, 4), 2, out_channels=8)`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int | Sequence[int],
        out_channels: int,
        mid_attention: bool = True,
        attention_levels: Sequence[bool] | None = None,
        dropout: float = 0.0,
        groups: int = 32,
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        blocks = per_level(num_res_blocks, levels, "num_res_blocks")
        attended = per_level(attention_levels or False, levels, "attention_levels")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.factor = 2 ** (levels - 1)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        width = channels
        for i, mult in enumerate(channel_mult):
            ins, width = width, channels * mult
            resample = Downsample(width, asymmetric=True) if i < levels - 1 else None
            self.down.append(Level(ins, width, blocks[i], attended[i], resample, dropout, groups))
        self.middle = Middle(width, mid_attention, dropout, groups)
        self.norm_out = group_norm(width, groups, EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, in_channels, H, W] in [-1, 1] to [B, out_channels, H / factor, W / factor]."""
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.middle(h))))
        return out


class Decoder(nn.Module):
    """Images [B, out_channels, h * factor, w * factor] of latents [B, in_channels, h, w].

    The mirror of `Encoder`, with the same arguments and one residual block more per level. The entries of
    `channel_mult`, `num_res_blocks` and `attention_levels` are in the encoder's order, finest level first.
    SD's KL-f8 is `Decoder(4, 128, (1, 2, 4, 4), 2, out_channels=3)`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int | Sequence[int],
        out_channels: int = 3,
        mid_attention: bool = True,
        attention_levels: Sequence[bool] | None = None,
        dropout: float = 0.0,
        groups: int = 32,
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        blocks = per_level(num_res_blocks, levels, "num_res_blocks")
        attended = per_level(attention_levels or False, levels, "attention_levels")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.factor = 2 ** (levels - 1)
        width = channels * channel_mult[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.middle = Middle(width, mid_attention, dropout, groups)
        self.up = nn.ModuleList()  # coarsest level first
        for i in reversed(range(levels)):
            ins, width = width, channels * channel_mult[i]
            resample = Upsample(width) if i else None
            self.up.append(Level(ins, width, blocks[i] + 1, attended[i], resample, dropout, groups))
        self.norm_out = group_norm(width, groups, EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[B, in_channels, h, w] to [B, out_channels, h * factor, w * factor], in about [-1, 1]."""
        h = self.middle(self.conv_in(z))
        for level in self.up:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out
