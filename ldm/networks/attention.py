"""Attention over the pixels of a feature map, and to the tokens of a condition."""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.blocks import group_norm
from ldm.networks.cpu import scaled_dot_product_attention


def head_count(channels: int, num_heads: int | None, head_channels: int | None) -> int:
    """How many heads `channels` are split into: a fixed number (SD 1) or a fixed width (SD 2, SDXL)."""
    if (num_heads is None) == (head_channels is None):
        raise UserError(f"give one of num_heads ({num_heads}) and head_channels ({head_channels}), not both")
    heads = num_heads if num_heads is not None else channels // (head_channels or 1)
    width = channels // heads if head_channels is None and heads else head_channels
    if not heads or heads * (width or 0) != channels:
        raise UserError(
            f"{channels} channels do not split into heads with num_heads={num_heads}, "
            f"head_channels={head_channels}; choose a divisor of {channels}"
        )
    return heads


class Attention(nn.Module):
    """Multi-head attention from x [B, N, C] to a context [B, L, D]; to x itself without one."""

    def __init__(self, channels: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[B, N, C]; mask [B, 1, 1, L] bool, True = attend."""
        context = x if context is None else context
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, C/heads]
        k = self.to_k(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.to_v(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        h = scaled_dot_product_attention(q, k, v, mask)
        out: Tensor = self.to_out(h.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """A gated feed-forward layer, GEGLU (Shazeer 2020): out(value * gelu(gate)), four times as wide.

    Value and gate are two products with the halves of one weight (the layout of published files): the halves of one
    product have gaps between their rows in memory, which takes up to 1.4 times as long on a CPU.
    """

    def __init__(self, channels: int, mult: int = 4) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * mult * channels)
        self.out = nn.Linear(mult * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]."""
        value, gate = map(F.linear, (x, x), self.proj.weight.chunk(2), self.proj.bias.chunk(2))
        out: Tensor = self.out(value * F.gelu(gate))
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, each behind a LayerNorm, each residual.

    Without a `context_dim` there is no cross-attention.
    """

    def __init__(self, channels: int, heads: int, context_dim: int | None) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, heads)
        self.cross_attention: Attention | None = None
        if context_dim is not None:
            self.norm_2 = nn.LayerNorm(channels)
            self.cross_attention = Attention(channels, heads, context_dim)
        self.norm_3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)

    def forward(self, x: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """[B, N, C] to [B, N, C]; tokens [B, L, context_dim]; mask [B, 1, 1, L] bool."""
        h: Tensor = x + self.self_attention(self.norm_1(x))
        if self.cross_attention is not None:
            h = h + self.cross_attention(self.norm_2(h), tokens, mask)
        h = h + self.feed_forward(self.norm_3(h))
        return h


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022, appendix E.2.1).

    The projections in and out are 1x1 convolutions (SD 1) or linear layers (SD 2, SDXL): the same map,
    with weights of another shape.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int = 1,
        context_dim: int | None = None,
        use_linear_projection: bool = False,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.linear = use_linear_projection
        self.norm = group_norm(channels, groups, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[B, C, h, w] to [B, C, h, w]; tokens [B, L, context_dim]; mask [B, 1, 1, L] bool."""
        h: Tensor = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # [B, h w, C]
        h = self.proj_in(h) if self.linear else h
        for block in self.blocks:
            h = block(h, tokens, mask)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).reshape(x.shape)  # [B, C, h, w]
        out: Tensor = x + (h if self.linear else self.proj_out(h))
        return out


class PixelAttention(nn.Module):
    """Self-attention over the pixels of a feature map: the autoencoder's, with one head, and that of the
    unconditional UNets, with several (`AttentionBlock` in LDM's code; Dhariwal and Nichol 2021)."""

    def __init__(self, channels: int, groups: int = 32, heads: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, groups, eps)
        self.to_q = nn.Conv2d(channels, channels, 1)
        self.to_k = nn.Conv2d(channels, channels, 1)
        self.to_v = nn.Conv2d(channels, channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[B, C, h, w] to [B, C, h, w]; there are no tokens to attend to."""
        h = self.norm(x)
        q, k, v = (
            to(h).flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)  # [B, heads, h w, C / heads]
            for to in (self.to_q, self.to_k, self.to_v)
        )
        h = scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.to_out(h.transpose(2, 3).reshape(x.shape))
        return out
