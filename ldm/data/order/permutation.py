"""Permutations of [0, n) by key, of which any place is computed at once, without a list in memory.

A generalised Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains", section 5) whose round function is SplitMix64 (Steele, Lea and Flood 2014).
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 8


def mix(x: Words) -> Words:
    """SplitMix64's output function."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold(keys: Words, number: Ints | int) -> Words:
    """A different key for each (key, number)."""
    counter = np.atleast_1d(np.asarray(number)).astype(np.uint64) + np.uint64(1)
    return mix(keys + counter * np.uint64(0x9E3779B97F4A7C15))


def word(key: int) -> Words:
    """The 64 bits [1] of an int64 key."""
    return np.array([key % (1 << 64)], np.uint64)


def uniform(keys: Words) -> NDArray[np.float64]:
    """A number in [0, 1) for each key."""
    return (mix(keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _remainder(x: Words, divisor: Words) -> Words:
    """x modulo the divisor. NumPy divides by one divisor for all several times as fast as it takes remainders."""
    return x - x // divisor * divisor


def _feistel(x: Words, a: Words, b: Words, keys: Words) -> Words:
    """A permutation of [0, a b), elementwise: x = left b + right, each half in turn moved by the other."""
    left = x // b
    right = x - left * b
    for number in range(ROUNDS):
        round_keys = fold(keys, number)
        if number % 2 == 0:
            left = _remainder(left + _remainder(mix(round_keys + right), a), a)
        else:
            right = _remainder(right + _remainder(mix(round_keys + left), b), b)
    return left * b + right


def permute(x: Ints, sizes: Ints, keys: Words) -> Ints:
    """Where x [B] in [0, sizes) goes under the permutation of [0, sizes) that each key names.

    `sizes` and `keys` are [B], or [1] where all share one, which is several times as fast.
    """
    n = sizes.astype(np.uint64)
    a = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a  # n <= a b < n + a
    y = _feistel(x.astype(np.uint64), a, b, keys)
    while (outside := y >= n).any():  # follow the cycle until it is back inside
        at = [part[outside] if len(part) == len(y) else part for part in (a, b, keys)]
        y[outside] = _feistel(y[outside], *at)
    return y.astype(np.int64)
