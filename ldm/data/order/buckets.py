"""Aspect-ratio buckets: the sizes that pictures are trained at, and which one a picture belongs to."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from math import log

import numpy as np
from numpy.typing import NDArray

from ldm.data.order.plan import bucket_masses
from ldm.errors import UserError

Size = tuple[int, int]  # height, width
Ints = NDArray[np.int64]


class Buckets(ABC):
    """The training sizes; a picture belongs to the one whose aspect ratio is nearest in its logarithm."""

    @abstractmethod
    def sizes(self, size: Size) -> list[Size]:
        """The sizes for the data's `size`, in the order of their aspect ratios."""

    @abstractmethod
    def choose(self, table: "Table", minimum: int) -> list[Size]:
        """The sizes to use, given the samples in `table`; each needs `minimum` of them."""


class AspectRatios(Buckets):
    """All sizes of sides that `step` divides, of 90 to 100 % of the area of `size`, and of ratios up to `max_ratio`.

    At 1024 with step 64 and ratio 4 they hold SDXL's table (Podell et al. 2023, appendix I). A bucket with fewer
    samples than a global batch is left out, the smallest first; its samples go to the nearest that is left.
    """

    def __init__(self, step: int = 64, max_ratio: float = 4.0) -> None:
        if step < 1 or max_ratio < 1:
            raise UserError(f"buckets: step={step} and max_ratio={max_ratio} have to be 1 or more")
        self.step = step
        self.max_ratio = max_ratio

    def sizes(self, size: Size) -> list[Size]:
        """All that fit; UserError where none does."""
        area, step = size[0] * size[1], self.step
        sizes: dict[float, Size] = {}
        for height in range(step, int((area * self.max_ratio) ** 0.5) + 1, step):
            for width in range(area // height // step * step, 0, -step):
                if height * width < 0.9 * area:
                    break
                if max(height, width) <= self.max_ratio * min(height, width):
                    sizes[height / width] = max((height, width), sizes.get(height / width, (0, 0)))
        if not sizes:
            raise UserError(
                f"buckets: no size of sides that {step} divides has 90 to 100 % of the area of {size[0]} x {size[1]}; "
                "make step smaller, or size a multiple of it"
            )
        return _ordered(list(sizes.values()))

    def choose(self, table: "Table", minimum: int) -> list[Size]:
        """Those left after the smallest are removed."""
        places = list(range(len(table.sizes)))
        while len(places) > 1 and (masses := table.masses(places)).min() < minimum:
            places.pop(int(masses.argmin()))
        return [table.sizes[i] for i in places]


class Sizes(Buckets):
    """The sizes [height, width] that are listed; each needs as many samples as a global batch has."""

    def __init__(self, sizes: Sequence[Sequence[int]]) -> None:
        listed = [tuple(size) for size in sizes]
        if not listed or any(len(s) != 2 or min(s) < 1 for s in listed):
            raise UserError(f"buckets: sizes is a list of [height, width] in pixels, got {list(sizes)}")
        if len({h / w for h, w in listed}) < len(listed):
            raise UserError(f"buckets: two of the sizes {listed} have the same aspect ratio; list one of them")
        self._sizes = _ordered([(h, w) for h, w in listed])

    def sizes(self, size: Size) -> list[Size]:
        """Those that are listed, whatever `size` is."""
        return self._sizes

    def choose(self, table: "Table", minimum: int) -> list[Size]:
        """All of them; UserError where one lacks samples."""
        masses = table.masses(list(range(len(table.sizes))))
        if len(masses) > 1 and masses.min() < minimum:
            counts = ", ".join(f"{h} x {w}: {n}" for (h, w), n in zip(table.sizes, masses, strict=True))
            raise UserError(
                f"buckets: each size needs a global batch of samples, {minimum}; height x width: samples are {counts}. "
                "List fewer sizes, or make the global batch smaller"
            )
        return table.sizes


def _ordered(sizes: list[Size]) -> list[Size]:
    return sorted(sizes, key=lambda size: size[0] / size[1])


def edges(sizes: Sequence[Size]) -> NDArray[np.float64]:
    """The log aspect ratios [B - 1] between neighbouring sizes, above which a picture belongs to the next."""
    ratios = [log(h / w) for h, w in sizes]
    return np.array([(a + b) / 2 for a, b in pairwise(ratios)])


class Table:
    """How many samples of each source would be in each bucket, for any choice among the sizes.

    The log aspect ratios are counted between the edges of all pairs of sizes, since a bucket that is left out
    makes two others neighbours.
    """

    def __init__(self, sizes: list[Size], weights: Sequence[float] | None = None) -> None:
        self.sizes = sizes
        self.weights = weights
        pairs = [float(edges([a, b])[0]) for i, a in enumerate(sizes) for b in sizes[i + 1 :]]
        self.edges = np.unique(np.array(pairs, dtype=np.float64))
        self.counts: list[Ints] = []  # of each source [edges + 1]

    def count(self, log_ratios: NDArray[np.float64]) -> Ints:
        """How many log aspect ratios lie between the edges."""
        places = np.searchsorted(self.edges, log_ratios, side="right")
        return np.bincount(places, minlength=len(self.edges) + 1).astype(np.int64)

    def samples(self, places: Sequence[int]) -> Ints:
        """The samples [D, B] of each source in each of the sizes at these places."""
        here = np.searchsorted(self.edges, edges([self.sizes[i] for i in places]))
        cuts = [0, *(here + 1).tolist(), len(self.edges) + 1]
        return np.array([[c[a:b].sum() for a, b in pairwise(cuts)] for c in self.counts])

    def masses(self, places: Sequence[int]) -> Ints:
        """The samples of each of these sizes [B] in an epoch, which has one visit per sample on average."""
        return bucket_masses(self.samples(places), self.weights)
