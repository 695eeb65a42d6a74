"""The UNet of latent diffusion: the LDM family and Stable Diffusion 1, 2 and XL by constructor arguments."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError
from ldm.networks.attention import PixelAttention, SpatialTransformer, head_count
from ldm.networks.blocks import (
    Downsample,
    ResBlock,
    Upsample,
    double,
    group_norm,
    halve,
    per_level,
    sinusoidal_embedding,
    zero_,
)

PixelTransformer = SpatialTransformer | PixelAttention


class Block(nn.Module):
    """A residual block, followed by a transformer (or plain attention) on the levels that have attention.

    With `checkpointing` the backward pass computes it again instead of keeping its activations.
    """

    def __init__(self, res: ResBlock, attention: PixelTransformer | None, checkpointing: bool) -> None:
        super().__init__()
        self.res = res
        self.attention = attention
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """[B, C_in, h, w] to [B, C_out, h, w]."""
        if self.checkpointing and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(self._block, x, emb, tokens, mask, use_reentrant=False)
            return recomputed
        return self._block(x, emb, tokens, mask)

    def _block(self, x: Tensor, emb: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        h: Tensor = self.res(x, emb)
        return h if self.attention is None else self.attention(h, tokens, mask)


class DownLevel(nn.Module):
    """The blocks at one resolution on the way down, and the halving after them (None at the end)."""

    def __init__(self, blocks: list[Block], downsample: Downsample | ResBlock | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, h: Tensor, emb: Tensor, tokens: Tensor | None, mask: Tensor | None) -> list[Tensor]:
        """Every feature map that the way up concatenates; the last one is the input of the next level."""
        outputs = []
        for block in self.blocks:
            h = block(h, emb, tokens, mask)
            outputs.append(h)
        if self.downsample is not None:
            outputs.append(self.downsample(h, emb))
        return outputs


class UpLevel(nn.Module):
    """The blocks at one resolution on the way up, and the doubling after them (None at the end)."""

    def __init__(self, blocks: list[Block], upsample: Upsample | ResBlock | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(
        self, h: Tensor, skips: list[Tensor], emb: Tensor, tokens: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """[B, C, h, w] at the next resolution; takes the feature maps it uses off the end of `skips`."""
        for block in self.blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, tokens, mask)
        return h if self.upsample is None else self.upsample(h, emb, skips[-1].shape[-2:])


class UNet(nn.Module):
    """The prediction [B, out_channels, h, w] for noisy latents, their time and a condition.

    Args:
        in_channels: channels of z and `concat` together.
        out_channels: channels of the prediction.
        model_channels: width of the first level; level i has model_channels * channel_mult[i].
        channel_mult: one factor per level; each further level halves the resolution.
        num_res_blocks: blocks on each level's way down (one more on its way up); a number, or one per level.
        attention_levels: which levels have transformers. The middle always has one.
        transformer_depth: transformer blocks per transformer, a number or one per level. The middle takes
            the last entry. 0: plain self-attention instead of transformers (LDM's unconditional models).
        num_heads, head_channels: one of the two: a fixed number of heads, or of channels per head.
        context_dim: width of the tokens; None for an unconditional model (self-attention only).
        use_linear_projection: projections of the transformers as linear layers (SD 2, SDXL).
        vector_dim: width of the vector condition, added to the time embedding (SDXL's `adm_in_channels`).
        use_scale_shift_norm: the embedding scales and shifts the norm in the residual blocks instead of being added.
        resblock_updown: residual blocks halve and double the resolution (`resblock_updown` in LDM), instead of
            convolutions.
        dropout: in the residual blocks.
        groups: of the group norms; the greatest common divisor with the channels is taken.
        gradient_checkpointing: recompute each block in the backward pass: less memory, about 1.3 the time.
        zero_init_residual: residual branches start at zero (LDM), so that each block is the identity; false: they
            start at random (diffusers), and a short run learns from the tokens sooner.

    A UNet without transformers takes no tokens: leave context_dim at None then.

    Source: Rombach et al. 2022 (LDM), the `openaimodel.UNetModel` of its code. SD 1.x:
    `UNet(4, 4, 320, (1, 2, 4, 4), 2, (True, True, True, False), num_heads=8, context_dim=768)`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int | Sequence[int],
        attention_levels: Sequence[bool],
        num_heads: int | None = None,
        head_channels: int | None = None,
        context_dim: int | None = None,
        transformer_depth: int | Sequence[int] = 1,
        use_linear_projection: bool = False,
        vector_dim: int | None = None,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        dropout: float = 0.0,
        groups: int = 32,
        gradient_checkpointing: bool = False,
        zero_init_residual: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.model_channels = in_channels, out_channels, model_channels
        self.context_dim, self.vector_dim = context_dim, vector_dim
        widths = [model_channels * mult for mult in channel_mult]
        depths = per_level(transformer_depth, len(widths), "transformer_depth")
        counts = per_level(num_res_blocks, len(widths), "num_res_blocks")
        attends = per_level(attention_levels, len(widths), "attention_levels")
        emb_channels = 4 * model_channels
        res = partial(ResBlock, emb_channels=emb_channels, use_scale_shift_norm=use_scale_shift_norm,
                      dropout=dropout, groups=groups)  # fmt: skip

        def block(ins: int, outs: int, attend: bool, depth: int) -> Block:
            attention: PixelTransformer | None = None
            if attend:
                heads = head_count(outs, num_heads, head_channels)
                attention = (
                    SpatialTransformer(outs, heads, depth, context_dim, use_linear_projection, groups)
                    if depth
                    else PixelAttention(outs, groups, heads, eps=1e-5)
                )
            return Block(res(ins, outs), attention, gradient_checkpointing)

        self.time_embed = _mlp(model_channels, emb_channels)
        self.vector_embed = None if vector_dim is None else _mlp(vector_dim, emb_channels)
        self.conv_in = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        self.down, width, skips = nn.ModuleList(), model_channels, [model_channels]
        for outs, count, attend, depth in zip(widths, counts, attends, depths, strict=True):
            blocks = [block(outs if i else width, outs, attend, depth) for i in range(count)]
            width = outs if count else width
            skips += [width] * count
            downsample: Downsample | ResBlock | None = None
            if len(self.down) < len(widths) - 1:
                downsample = res(width, width, resize=halve) if resblock_updown else Downsample(width)
                skips.append(width)
            self.down.append(DownLevel(blocks, downsample))
        self.skip_channels = tuple(skips)
        self.middle = nn.ModuleList([block(width, width, True, depths[-1]), block(width, width, False, 0)])
        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            blocks = []
            for _ in range(counts[i] + 1):
                blocks.append(block(width + skips.pop(), widths[i], attends[i], depths[i]))
                width = widths[i]
            upsample: Upsample | ResBlock | None = None
            if i:
                upsample = res(width, width, resize=double) if resblock_updown else Upsample(width)
            self.up.append(UpLevel(blocks, upsample))
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        zero_(self.conv_out)  # the prediction starts at zero
        if zero_init_residual:
            self._zero_init_residual()

    def _zero_init_residual(self) -> None:
        for module in self.modules():
            if isinstance(module, ResBlock):
                zero_(module.conv_2)
            elif isinstance(module, SpatialTransformer):
                zero_(module.proj_out)
            elif isinstance(module, PixelAttention):
                zero_(module.to_out)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The prediction [B, out_channels, h, w].

        z [B, C, h, w] noisy latents; t [B] network times in [0, 1000]; tokens [B, L, context_dim]; mask
        [B, L] bool, True = attend; vector [B, vector_dim]; concat [B, in_channels - C, h, w];
        control: a `ControlNet`'s feature maps.
        """
        skips, h, emb = self.encode(z, t, tokens, mask, vector, concat)
        if control is not None:
            skips = [skip + more for skip, more in zip(skips, control[:-1], strict=True)]
            h = h + control[-1]
        attend = None if mask is None else mask[:, None, None, :]
        for level in self.up:
            h = level(h, skips, emb, tokens, attend)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError for latents of no pixels; every other size fits, odd ones too."""
        if height < 1 or width < 1:
            raise UserError(f"latents of {height} x {width}: expected at least 1 x 1; give a larger size")

    def encode(
        self,
        z: Tensor,
        t: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
        hint: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The way down: its feature maps (finest first), the middle's, and the embedding [B, 4 model_channels].

        Arguments as in `forward`; `hint` [B, model_channels, h, w] is added before the first level.
        """
        self._check(z, tokens, vector, concat)
        h = z if concat is None else torch.cat([z, concat], dim=1)
        emb = self.time_embed(sinusoidal_embedding(t, self.model_channels).to(h.dtype))
        emb = F.silu(emb if self.vector_embed is None else emb + self.vector_embed(vector))
        attend = None if mask is None else mask[:, None, None, :]  # as attention takes it
        h = self.conv_in(h)
        skips = [h if hint is None else h + hint]
        for level in self.down:
            skips += level(skips[-1], emb, tokens, attend)
        h = skips[-1]
        for block in self.middle:
            h = block(h, emb, tokens, attend)
        return skips, h, emb

    def _check(self, z: Tensor, tokens: Tensor | None, vector: Tensor | None, concat: Tensor | None) -> None:
        """Raises UserError where the condition is not the one that the network was built for."""
        inputs = {"tokens": (tokens, self.context_dim), "vector": (vector, self.vector_dim)}
        for name, (value, width) in inputs.items():
            if (None if value is None else value.shape[-1]) != width:
                shape = None if value is None else list(value.shape)
                raise UserError(f"{name} of shape {shape}; this UNet was built for a width of {width}")
        added = 0 if concat is None else concat.shape[1]
        if z.shape[1] + added != self.in_channels:
            raise UserError(
                f"latents of {z.shape[1]} channels and a concat of {added}; this UNet was built for "
                f"in_channels={self.in_channels} of both together"
            )
        if concat is not None and concat.shape[2:] != z.shape[2:]:
            raise UserError(
                f"a concat of {list(concat.shape[2:])} pixels with latents of {list(z.shape[2:])}: expected one size"
            )


def _mlp(in_channels: int, out_channels: int) -> nn.Sequential:
    """Linear, SiLU, linear: the embedding of time, and of a vector condition."""
    return nn.Sequential(nn.Linear(in_channels, out_channels), nn.SiLU(), nn.Linear(out_channels, out_channels))
