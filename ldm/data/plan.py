"""The order of samples as a pure function of (samples, seed, window, position); no state, no list in memory.

Position p of the endless stream belongs to epoch p // samples, and batches run across epochs: each epoch
holds every sample exactly once and nothing is dropped. The permutation is a generalised Feistel network with
cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 5) whose round
function is SplitMix64, so any position costs the same and no position depends on another.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError
from ldm.randomness import key

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 8
STRETCHES = 64  # a window is this many stretches of consecutive samples


def _mix(x: Words) -> Words:
    """SplitMix64's output function (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _fold(keys: Words, number: Ints | int) -> Words:
    """A key of its own for each (key, number)."""
    counter = np.atleast_1d(np.asarray(number)).astype(np.uint64) + np.uint64(1)
    return _mix(keys + counter * np.uint64(0x9E3779B97F4A7C15))


def _feistel(x: Words, a: Words, b: Words, keys: Words) -> Words:
    """A permutation of [0, a b), elementwise: x = left b + right, each half in turn moved by the other."""
    left, right = x // b, x % b
    for number in range(ROUNDS):
        round_keys = _fold(keys, number)
        if number % 2 == 0:
            left = (left + _mix(round_keys + right) % a) % a
        else:
            right = (right + _mix(round_keys + left) % b) % b
    return left * b + right


def permute(x: Ints, sizes: Ints, keys: Words) -> Ints:
    """Where x [B] in [0, sizes) goes under the permutation of [0, sizes) that each key [B] names."""
    n = sizes.astype(np.uint64)
    a = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a  # n <= a b < n + a
    y = _feistel(x.astype(np.uint64), a, b, keys)
    while (outside := y >= n).any():  # walk on along the cycle until it is back inside
        y[outside] = _feistel(y[outside], a[outside], b[outside], keys[outside])
    return y.astype(np.int64)


@dataclass(frozen=True)
class Plan:
    """Which sample stands at which position of which global step.

    samples       in the manifest
    global_batch  samples of one optimizer step, over all ranks and accumulated micro-steps
    window        samples that are mixed with each other; None mixes the whole epoch. A window is 64 stretches
                  of window / 64 consecutive samples, taken from anywhere, so that reads stay near each other.
    """

    samples: int
    global_batch: int
    seed: int
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "global_batch", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")

    def step(self, step: int) -> tuple[Ints, Ints]:
        """(indices, epochs), each [global_batch] int64, of a global step."""
        return self.at(step, np.arange(self.global_batch, dtype=np.int64))

    def at(self, step: int, positions: Ints) -> tuple[Ints, Ints]:
        """(indices, epochs), each [B] int64, at positions [B] of the global batch of a step."""
        epochs, k = np.divmod(step * self.global_batch + positions, self.samples)
        return self._index(k, epochs), epochs

    def _index(self, k: Ints, epochs: Ints) -> Ints:
        """The sample at place k of an epoch.

        The place is mixed within its window; the slot that results names a stretch, and the stretches are
        mixed over the epoch. The last stretch, which may be short, stays last, so the samples are numbered
        from another one in each epoch.
        """
        window = min(self.window or self.samples, self.samples)
        stretch = 1 if window == self.samples else max(1, window // STRETCHES)
        window -= window % stretch
        base = np.full(len(k), key(self.seed, "order") % (1 << 64), np.uint64)
        keys = _fold(base, epochs)
        number, place = np.divmod(k, window)
        sizes = np.minimum(window, self.samples - number * window)
        slot = number * window + permute(place, sizes, _fold(keys, number + 2))
        if window == self.samples:
            return slot
        whole = self.samples // stretch
        block, inside = np.divmod(slot, stretch)
        mixed = permute(np.minimum(block, whole - 1), np.full(len(k), whole), _fold(keys, 0))
        start = (_fold(keys, 1) % np.uint64(self.samples)).astype(np.int64)
        index: Ints = (np.where(block < whole, mixed, block) * stretch + inside + start) % self.samples
        return index

    def rank_slice(self, rank: int, world: int, micro: int, accumulation: int = 1) -> Ints:
        """Positions [accumulation, micro] of the global batch that a rank takes, the same in every step.

        Micro-step a of rank r takes `micro` positions from (a world + r) micro on. Raises UserError unless
        global_batch = world micro accumulation.
        """
        if world * micro * accumulation != self.global_batch or not 0 <= rank < world:
            raise UserError(
                f"global_batch {self.global_batch} is not {world} ranks x {micro} samples x "
                f"{accumulation} accumulated micro-steps (rank {rank}); change one of them"
            )
        return np.arange(self.global_batch, dtype=np.int64).reshape(accumulation, world, micro)[:, rank]


def micro_batch(global_batch: int, world: int, accumulation: int) -> int:
    """The samples of one micro-step of one rank. Raises UserError where it is no whole number."""
    shares = world * accumulation
    if global_batch < 1 or global_batch % shares:
        near = max(1, round(global_batch / shares)) * shares
        raise UserError(
            f"global_batch {global_batch} cannot be shared by {world} ranks x {accumulation} accumulated "
            f"micro-steps; make it a multiple of {shares}, such as {near}"
        )
    return global_batch // shares
