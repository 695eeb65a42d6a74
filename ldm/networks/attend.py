"""softmax(q k^T / sqrt(d)) v: the one place that chooses how it is computed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.networks.chunked_attention import chunked_attention

NARROW_channels = 32
LARGE_entries = 1 << 14  # of one head's weights; below, both ways cost next to nothing
MATRIX_UNITS = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
LANES = 16  # float32 numbers in a vector register of AVX-512
SOME_pixels, MANY_pixels = 256, 1024  # from where on a copy is worth its time: to fill vectors, to bring rows together


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, heads, N, d] of q [B, heads, N, d], k and v [B, heads, L, d]; mask [B, 1, 1, L] bool, True = attend.

    torch's flash attention, but for narrow heads in bfloat16 on a CPU that multiplies bfloat16 matrices in hardware:
    there flash attention spends its time on exponentials in float32 and on products of a few columns, so that whole
    matrices are faster (2.5 times at a width of 16, measured on two cores), and `chunked_attention` keeps them
    from costing memory. In float32 they are not faster.
    """
    if q.device.type == "cpu":
        narrow = q.shape[-1] <= NARROW_channels and q.shape[-2] * k.shape[-2] >= LARGE_entries
        if MATRIX_UNITS and narrow and q.dtype == torch.bfloat16:
            return chunked_attention(q, k, v, mask)
        k, v, mask = _laid_out(q.shape[-2], k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _laid_out(pixels: int, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask as torch's flash attention on a CPU is fastest with (measured by benchmarks.attention).

    Keys that do not fill its vectors cost it one by one: 77 tokens take 1.2 to 1.4 times as long as 80 of which three
    are masked, without a backward pass up to twice. Over many pixels, heads whose rows lie apart in memory, as the
    projections leave them, take 1.07 times as long. (The queries' layout hardly matters, and is the output's.)
    """
    missing = -k.shape[-2] % LANES
    if missing and pixels >= SOME_pixels:
        if mask is None:
            mask = torch.ones(1, 1, 1, k.shape[-2], dtype=torch.bool, device=k.device)
        mask = F.pad(mask, (0, missing))
        k, v = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing))
    elif pixels >= MANY_pixels:
        k, v = k.contiguous(), v.contiguous()
    return k, v, mask
