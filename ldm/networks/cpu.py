"""What is faster on a CPU: attention's layout (`benchmarks.attention`), freed memory kept (`benchmarks.networks`)."""

import ctypes
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

VECTOR_floats = 16  # in a vector register of AVX-512
PAD_pixels, CONTIGUOUS_pixels = 256, 1024  # queries from which a copy of the keys is worth its time

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
LARGEST_bytes = 32 << 20  # of a block that stays: glibc allows no larger threshold
ALLOCATOR_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # the user's settings, or another allocator


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, heads, N, d]; q [B, heads, N, d]; k, v [B, heads, L, d].

    mask [B, 1, 1, L] bool, True = attend. It is torch's; on a CPU keys, values and mask are first laid out as its
    kernel is fastest with (`benchmarks.attention`). It takes keys that do not fill its vectors one by one: 77 tokens
    take 1.2 to 1.4 times as long as 80 of which three are masked, without a backward pass up to twice. Over many
    pixels, heads with gaps between their rows, as the projections leave them, take 1.07 times as long.
    """
    if q.device.type == "cpu":
        pixels, missing = q.shape[-2], -k.shape[-2] % VECTOR_floats
        if missing and pixels >= PAD_pixels:
            if mask is None:
                mask = torch.ones(1, 1, 1, k.shape[-2], dtype=torch.bool, device=k.device)
            mask = F.pad(mask, (0, missing))
            k, v = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing))
        elif pixels >= CONTIGUOUS_pixels:
            k, v = k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def keep_freed_memory() -> bool:
    """Keep the memory that this process frees from now on; returns whether that could be done.

    glibc gives the upper end of its heap back to the system and asks for it again at every step, zeroed page by page:
    about 4 % of a UNet's train step on the CPU (`benchmarks.networks`). Blocks of more than LARGEST_bytes go back as
    before, so that the process stays near its peak. It sets mallopt(3), on glibc alone, and not where the
    environment (ALLOCATOR_SETTINGS) decides otherwise.
    """
    if sys.platform != "linux" or any(name.startswith(ALLOCATOR_SETTINGS) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, LARGEST_bytes) and mallopt(TRIM_THRESHOLD, -1))
