"""How many samples of each global batch come from each of several sources, and which positions they take."""

import numpy as np
from numpy.typing import NDArray

from ldm.data.order.permutation import Ints, permute, word
from ldm.randomness import key

PERIOD = 1024  # batches after which the numbers repeat; shares hold to one in global batch x PERIOD


class MixtureSchedule:
    """The batches of one bucket shared among D sources: numbers that hold each share to one sample.

    Systematic sampling (Madow 1949): the shares are laid end to end on [0, 1), and batch c takes the points
    (i + phi) / G, i < G, so that a source of share r gets floor(G r) or ceil(G r) of them; phi runs through the
    van der Corput sequence, which makes the sums over batches even. A permutation keyed by the batch spreads
    the sources over the batch's positions, and so over ranks.
    """

    def __init__(self, shares: NDArray[np.float64], global_batch: int, seed: int, bucket: int) -> None:
        """`shares` [D] sum to one."""
        self.global_batch = global_batch
        self._address = (seed, "mix", bucket)
        bits = PERIOD.bit_length() - 1
        phi = np.array([int(f"{c:0{bits}b}"[::-1], 2) for c in range(PERIOD)]) / PERIOD
        ends = np.cumsum(shares) * global_batch
        ends[-1] = global_batch
        upto = np.ceil(ends[None] - phi[:, None]).astype(np.int64).clip(0, global_batch)  # points below each end
        self.numbers: Ints = np.diff(upto, axis=1, prepend=0)  # [PERIOD, D]
        self._sums = np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(self.numbers, axis=0)])

    def before(self, batches: int) -> Ints:
        """Samples taken from each source [D] by the first `batches` batches."""
        whole, rest = divmod(batches, PERIOD)
        counts: Ints = whole * self._sums[-1] + self._sums[rest]
        return counts

    def at(self, batch: int, positions: Ints) -> tuple[Ints, Ints]:
        """(source, place in its stream), each [P] int64, at positions [P] of a batch."""
        size = np.array([self.global_batch])
        slots = permute(positions, size, word(key(*self._address, batch)))
        ends = np.cumsum(self.numbers[batch % PERIOD])
        source = np.searchsorted(ends, slots, side="right")
        first = ends - self.numbers[batch % PERIOD]
        return source, self.before(batch)[source] + slots - first[source]
