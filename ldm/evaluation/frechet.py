"""The Frechet distance between the features of generated images and of a reference set.

FID where the features are Inception's (Heusel et al. 2017, equation 6). Everything is float64 from the
features on. The trace of the root of the product of covariances is the nuclear norm of the product of their
factors, `tr sqrt(A A' B B') = ||A' B||_*`: real, and exact also where there are fewer images than features,
where `scipy.linalg.sqrtm` turns complex or is off by 1e-5.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from scipy.stats import t as student
from torch import Tensor
from torchmetrics import Metric

from ldm.errors import UserError
from ldm.evaluation.interval import Interval

CHUNK = 4096  # feature vectors that are float64 at a time


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and unbiased covariance [D, D] of `count` feature vectors, float64."""

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def from_sums(cls, count: int, total: Tensor, outer: Tensor) -> Self:
        """From the sum [D] and the sum of outer products [D, D]; UserError for fewer than two vectors."""
        if count < 2:
            raise UserError(f"a covariance needs at least 2 images, not {count}")
        mean = total / count
        return cls(count, mean, (outer - count * torch.outer(mean, mean)) / (count - 1))

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of features [N, D], in chunks."""
        dim = features.shape[1]
        total = torch.zeros(dim, dtype=torch.float64, device=features.device)
        outer = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
        for part in torch.split(features, CHUNK):
            values = part.to(torch.float64)
            total += values.sum(0)
            outer += values.T @ values
        return cls.from_sums(len(features), total, outer)

    @cached_property
    def factor(self) -> Tensor:
        """A [D, R] with A A' the covariance, R at most count - 1: rounding adds no direction to the rank."""
        values, vectors = torch.linalg.eigh(self.covariance)
        rank = min(self.count - 1, len(values))
        kept = torch.arange(len(values), device=values.device) >= len(values) - rank
        kept &= values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        factor: Tensor = vectors[:, kept] * values[kept].sqrt()
        return factor


def check_features(features: Tensor, dim: int) -> None:
    """UserError where features are not [B, dim]: they are another network's than the reference's."""
    if features.ndim != 2 or features.shape[1] != dim:
        raise UserError(f"the reference has {dim} features, these are {list(features.shape)}: of another network?")


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982)."""
    return _distance(a, b, float(torch.linalg.svdvals(a.factor.T @ b.factor).sum()))


def _distance(a: Statistics, b: Statistics, shared: float) -> float:
    """The squared distance, given the trace of the root of the product of the covariances."""
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces) - 2.0 * shared


def _distance_without_svd(a: Statistics, b: Statistics) -> float:
    """The squared distance by the factor of b alone: five times as fast, off by up to 1e-5."""
    values = torch.linalg.eigvalsh(b.factor.T @ a.covariance @ b.factor)
    return _distance(a, b, float(values.clamp(min=0.0).sqrt().sum()))


class FrechetDistance(Metric):
    """The Frechet distance of the features seen so far from a reference.

    The state is the count, sum and sum of outer products of the features in each of `groups` groups, so it
    adds up over batches and processes. An image's group is its index modulo `groups`. `interval` leaves out
    one group at a time (delete-a-group jackknife, Kott 2001): it is how far the number would move with other
    seeds, for this N and this reference. The distance's upward bias at small N is in every value and is not
    corrected: compare at equal N.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, reference: Statistics, groups: int = 10) -> None:
        super().__init__()
        if groups < 2:
            raise UserError(f"groups={groups}: the interval leaves out one group at a time, give 2 or more")
        self.reference, self.groups = reference, groups
        dim = len(reference.mean)
        self.add_state("count", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(groups, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(groups, dim, dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, indices: Tensor | None = None) -> None:
        """Adds features [B, D] of images with their indices [B] in the whole set.

        Without indices the images are numbered as they come, which is enough in one process; the distance
        itself does not depend on them, only the interval does.
        """
        check_features(features, len(self.reference.mean))
        features = features.to(self.total)
        if indices is None:
            start = int(self.count.sum())
            indices = torch.arange(start, start + len(features))
        group = indices.to(features.device) % self.groups
        for g in set(group.tolist()):
            part = features[group == g]
            self.count[g] += len(part)
            self.total[g] += part.sum(0)
            self.outer[g] += part.T @ part

    def compute(self) -> Tensor:
        """The distance, a float64 scalar."""
        return torch.tensor(frechet_distance(self._without(None), self._reference()), dtype=torch.float64)

    def interval(self, confidence: float = 0.95) -> Interval:
        """The confidence interval around `compute()`; after a distributed run, within `sync_context()`."""
        return self.estimate(confidence)[1]

    def estimate(self, confidence: float = 0.95) -> tuple[float, Interval]:
        """The value of `compute()` and its interval, from the distances without each group."""
        held = [g for g in range(self.groups) if self.count[g] > 0]
        if len(held) < 2:
            raise UserError(f"an interval needs images in 2 groups at least, there are {len(held)}")
        reference = self._reference()
        without = torch.tensor([_distance_without_svd(self._without(g), reference) for g in held], dtype=torch.float64)
        g = len(held)
        error = float(((g - 1) / g * (without - without.mean()).square().sum()).sqrt())
        half = float(student.ppf(0.5 + confidence / 2, g - 1)) * error
        value = frechet_distance(self._without(None), reference)
        return value, (max(0.0, value - half), value + half)

    def _reference(self) -> Statistics:
        """The reference where the state lies."""
        if (self.reference.mean.device, self.reference.mean.dtype) != (self.total.device, self.total.dtype):
            mean, covariance = self.reference.mean.to(self.total), self.reference.covariance.to(self.total)
            self.reference = Statistics(self.reference.count, mean, covariance)
        return self.reference

    def _without(self, group: int | None) -> Statistics:
        """The statistics of all images but those of a group."""
        kept = torch.tensor([g != group for g in range(self.groups)], device=self.total.device)
        return Statistics.from_sums(int(self.count[kept].sum()), self.total[kept].sum(0), self.outer[kept].sum(0))
