"""The kernel distance between the features of generated images and of a reference set.

KID where the features are Inception's (Binkowski et al. 2018): the squared maximum mean discrepancy with the
kernel `k(x, y) = (x'y / D + 1)^3`. In float64, a block of the kernel matrix at a time.

It is the unbiased estimate over all pairs. The mean over random subsets that other tools give (100 of 1000
images) has the same expectation and a larger variance, and depends on how the subsets are drawn.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from scipy.stats import t as student
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ldm.errors import UserError
from ldm.evaluation.frechet import check_features
from ldm.evaluation.interval import Interval

BLOCK = 1024  # images: a block of the kernel matrix is 8 MiB


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """The polynomial kernel [N, M] of features [N, D] and [M, D] (Binkowski et al. 2018, equation 4)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _blocks(features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for first in range(0, len(features), BLOCK):
        part = slice(first, min(first + BLOCK, len(features)))
        yield part, features[part].to(torch.float64)


def sums_within(x: Tensor) -> Tensor:
    """Of each of the features [N, D] the sum of its kernel with all the others, [N] float64."""
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for rows, a in _blocks(x):
        for columns, b in _blocks(x[: rows.stop]):
            values = kernel(a, b)
            if rows == columns:
                values.fill_diagonal_(0.0)
            else:
                sums[columns] += values.sum(0)
            sums[rows] += values.sum(1)
    return sums


def sums_between(x: Tensor, y: Tensor) -> Tensor:
    """Of each of the features x [N, D] the sum of its kernel with all of y [M, D], [N] float64."""
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for rows, a in _blocks(x):
        for _, b in _blocks(y):
            sums[rows] += kernel(a, b).sum(1)
    return sums


class Points:
    """The features [N, D] of a reference set; the sum over its own pairs is taken once."""

    def __init__(self, features: Tensor) -> None:
        if len(features) < 2:
            raise UserError(f"a kernel distance needs at least 2 reference images, not {len(features)}")
        self.features = features

    @cached_property
    def mean_within(self) -> float:
        """The mean kernel of two different images."""
        n = len(self.features)
        return float(sums_within(self.features).sum()) / (n * (n - 1))


class KernelDistance(Metric):
    """The squared maximum mean discrepancy of the features seen so far from a reference, unbiased.

    The state is the features themselves, joined over processes; 50,000 of 2048 take 0.4 GB. An unbiased
    estimate of a distance near 0 is as often negative. `interval` leaves out one image at a time
    (jackknife), whose values follow exactly from the sums of the kernel matrix's rows: it is how far the
    number would move with other seeds, for this N and this reference.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    points: list[Tensor] | Tensor

    def __init__(self, reference: Points) -> None:
        super().__init__()
        self.reference = reference
        self.add_state("points", [], dist_reduce_fx="cat")

    def update(self, features: Tensor) -> None:
        """Adds features [B, D] of images."""
        check_features(features, self.reference.features.shape[1])
        assert isinstance(self.points, list)
        self.points.append(features.detach().to(self.device, torch.float32, copy=True))

    def compute(self) -> Tensor:
        """The squared discrepancy, a float64 scalar (Gretton et al. 2012, lemma 6)."""
        within, between = self._sums()
        return torch.tensor(self._of_sums(len(within), float(within.sum()), float(between.sum())), dtype=torch.float64)

    def interval(self, confidence: float = 0.95) -> Interval:
        """The confidence interval around `compute()`; after a distributed run, within `sync_context()`."""
        return self.estimate(confidence)[1]

    def estimate(self, confidence: float = 0.95) -> tuple[float, Interval]:
        """The value of `compute()` and its interval from one pass over the pairs, which takes the time."""
        within, between = self._sums()
        n, m = len(within), len(self.reference.features)
        if n < 3:
            raise UserError(f"the interval of a kernel distance needs at least 3 images, not {n}")
        value = self._of_sums(n, float(within.sum()), float(between.sum()))
        without_within = (within.sum() - 2.0 * within) / ((n - 1) * (n - 2))
        without_between = (between.sum() - between) / ((n - 1) * m)
        without = without_within - 2.0 * without_between  # the reference's own part is the same in all
        error = float(((n - 1) / n * (without - without.mean()).square().sum()).sqrt())
        half = float(student.ppf(0.5 + confidence / 2, n - 1)) * error
        return value, (value - half, value + half)

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Of each image the sums of its kernel with the others and with the reference, [N] each."""
        x = dim_zero_cat(self.points)
        if len(x) < 2:
            raise UserError(f"a kernel distance needs at least 2 images, not {len(x)}")
        return sums_within(x), sums_between(x, self.reference.features.to(x.device))

    def _of_sums(self, n: int, within: float, between: float) -> float:
        m = len(self.reference.features)
        return within / (n * (n - 1)) + self.reference.mean_within - 2.0 * between / (n * m)
