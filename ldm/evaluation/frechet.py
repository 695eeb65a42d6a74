"""The Frechet distance between the features of generated images and of a reference set.

FID where the features are Inception's (Heusel et al. 2017, equation 6). Everything is float64 from the
features on. The trace of the root of the product of covariances is the nuclear norm of the product of their
factors, `tr sqrt(A A' B B') = ||A' B||_*`: real, and exact also where there are fewer images than features,
where `scipy.linalg.sqrtm` turns complex or is off by 1e-5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Self

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.features import Features, check_features
from ldm.evaluation.interval import jackknife
from ldm.evaluation.metric import Batch, Metric, Reference
from ldm.evaluation.protocol import Value

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
    """The Frechet distance between pictures and reference pictures in feature space; "FID" over FID's Inception.

    The state is the count, sum and sum of outer products of the features in each of `groups` groups, so it adds up
    over batches and processes. A picture's group is its index modulo `groups`. The interval leaves out one group at a
    time: it is how far the number would move with other seeds, for this N and this reference. The distance's upward
    bias at small N is in every value and is not corrected: compare at equal N.
    """

    higher_is_better = False
    needs_reference = True

    reference: Statistics
    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, features: Features, groups: int = 10) -> None:
        super().__init__()
        if groups < 2:
            raise UserError(f"groups={groups}: the interval leaves out one group at a time, give 2 or more")
        self.features, self.groups = features, groups
        self._source: Reference | None = None

    def set_reference(self, reference: Reference) -> None:
        if reference is not self._source:
            self.reference = Statistics.of(reference.features(self.features).to(self.features.device))
            self._source = reference
            dim, device = len(self.reference.mean), self.reference.mean.device
            zeros = partial(torch.zeros, dtype=torch.float64, device=device)
            self.add_state("count", torch.zeros(self.groups, dtype=torch.int64, device=device), dist_reduce_fx="sum")
            self.add_state("total", zeros(self.groups, dim), dist_reduce_fx="sum")
            self.add_state("outer", zeros(self.groups, dim, dim), dist_reduce_fx="sum")
        self.reset()

    def update(self, batch: Batch) -> None:
        features = batch.features(self.features)
        check_features(features, len(self.reference.mean))
        features = features.to(self.total)
        group = batch.indices.to(features.device) % self.groups
        for g in set(group.tolist()):
            part = features[group == g]
            self.count[g] += len(part)
            self.total[g] += part.sum(0)
            self.outer[g] += part.T @ part

    def compute(self) -> dict[str, Value]:
        held = [g for g in range(self.groups) if self.count[g] > 0]
        if len(held) < 2:
            raise UserError(f"an interval needs images in 2 groups at least, there are {len(held)}")
        without = [_distance_without_svd(self._without(g), self.reference) for g in held]
        half = jackknife(torch.tensor(without, dtype=torch.float64))
        value = frechet_distance(self._without(None), self.reference)
        return {self.features.frechet_label: Value(value, max(0.0, value - half), value + half)}

    def descriptions(self) -> Mapping[str, str]:
        return {self.features.frechet_label: self.features.description}

    def _without(self, group: int | None) -> Statistics:
        """The statistics of all images but those of a group."""
        kept = torch.tensor([g != group for g in range(self.groups)], device=self.total.device)
        return Statistics.from_sums(int(self.count[kept].sum()), self.total[kept].sum(0), self.outer[kept].sum(0))
