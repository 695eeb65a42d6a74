"""Random numbers with an address: what is drawn depends on (seed, step, position, ...) and on nothing else.

The generator is counter-based. A key is a 64-bit hash of an address; the n-th number of a key is
SplitMix64's output function at `key + n * golden` (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"). So a sample's noise is the same in any batch, on any rank, on any device
and after any interruption, and a whole batch is drawn by a few tensor operations.
"""

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_TWO_64 = 1 << 64


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as an unsigned value."""
    value %= _TWO_64
    return value - _TWO_64 if value >= _TWO_64 >> 1 else value


def key(*address: int | str) -> int:
    """The int64 key of an address, e.g. `key(seed, "crop", epoch, sample)`. Equal addresses, equal keys."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in address)
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def keys(*address: int | str, count: int, start: int = 0) -> Tensor:
    """Keys [count] of the addresses (*address, start), (*address, start + 1), ... as int64."""
    return torch.tensor([key(*address, start + i) for i in range(count)], dtype=torch.int64)


def fold(keys: Tensor, stream: str) -> Tensor:
    """Keys [B] of another stream of the same samples, so that noise and dropout are independent."""
    return _mix(keys + _signed(key(stream)))


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift; int64's own shift copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection of 64-bit words."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def _bits(keys: Tensor, count: int) -> Tensor:
    """Words [B, count] of 64 random bits."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _signed(_GOLDEN)
    return _mix(_mix(keys)[:, None] + counter[None, :])


def uniform(keys: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers [B, *shape] in [0, 1), float32, row i from keys[i] alone."""
    bits = _shift(_bits(keys, math.prod(shape)), 40)
    return (bits.to(torch.float32) * 2.0**-24).view(len(keys), *shape)


def normal(keys: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal numbers [B, *shape], float32, row i from keys[i] alone (Box and Muller 1958).

    Each 64-bit word gives the two uniforms of one pair, 32 bits each; the tail reaches 6.6 sigma.
    """
    count = math.prod(shape)
    words = _bits(keys, (count + 1) // 2)
    radius_bits = _shift(words, 32).to(torch.float64)
    angle_bits = (words & 0xFFFFFFFF).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((radius_bits + 0.5) * 2.0**-32))
    angle = angle_bits * (2.0 * math.pi * 2.0**-32)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :count].to(torch.float32).reshape(len(keys), *shape)
