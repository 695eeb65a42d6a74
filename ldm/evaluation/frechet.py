"""The Frechet distance between the features of generated images and of a reference set.

FID where the features are Inception's (Heusel et al. 2017, equation 6). Everything is float64 from the
features on. The trace of the root of the product of covariances is the nuclear norm of the product of their
factors, `tr sqrt(A A' B B') = ||A' B||_*`: real, and exact also where there are fewer images than features,
where `scipy.linalg.sqrtm` turns complex or is off by 1e-5.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from scipy.stats import t as student
from torch import Tensor
from torchmetrics import Metric

from ldm.checkpoint import load_tensors, save_tensors
from ldm.errors import UserError
from ldm.evaluation.features import Features


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
    return _distance(a, b, float(torch.linalg.svdvals(a.factor().T @ b.factor()).sum()))


def _distance(a: Statistics, b: Statistics, shared: float) -> float:
    """The squared distance, given the trace of the root of the product of the covariances."""
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces) - 2.0 * shared


def _distance_without_svd(a: Statistics, b: Statistics, factor: Tensor) -> float:
    """The squared distance with the factor of b at hand: five times as fast, off by up to 1e-5."""
    values = torch.linalg.eigvalsh(factor.T @ a.covariance @ factor)
    return _distance(a, b, float(values.clamp(min=0.0).sqrt().sum()))


class FrechetDistance(Metric):
    """The Frechet distance of the images seen so far from a reference; `label` says which one it is.

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

    def __init__(self, features: Features, reference: Statistics, groups: int = 10) -> None:
        super().__init__()
        if groups < 2:
            raise UserError(f"groups={groups}: the interval leaves out one group at a time, give 2 or more")
        if reference.mean.shape != (features.dim,):
            raise UserError(
                f"the reference has {len(reference.mean)} features, {features.name} gives {features.dim}: "
                "make it again with this network"
            )
        self.features, self.reference, self.groups = features, reference, groups
        dim = features.dim
        self.add_state("count", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(groups, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(groups, dim, dim, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def label(self) -> str:
        """ "FID" for Inception's features, else "Frechet(<network>)"."""
        return self.features.distance_label

    def update(self, images: Tensor, indices: Tensor | None = None) -> None:
        """Adds images [B, 3, H, W] in [0, 1] with their indices [B] in the whole set.

        Without indices the images are numbered as they come, which is enough in one process; the distance
        itself does not depend on them, only the interval does.
        """
        features = self.features(images).to(torch.float64)
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

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The confidence interval around `compute()`, from the distances without each group.

        Of this process's state; after a distributed run, within `sync_context()`.
        """
        held = [g for g in range(self.groups) if self.count[g] > 0]
        if len(held) < 2:
            raise UserError(f"an interval needs images in 2 groups at least, there are {len(held)}")
        reference = self._reference()
        factor = reference.factor()
        without = torch.tensor(
            [_distance_without_svd(self._without(g), reference, factor) for g in held], dtype=torch.float64
        )
        g = len(held)
        error = float(((g - 1) / g * (without - without.mean()).square().sum()).sqrt())
        half = float(student.ppf(0.5 + confidence / 2, g - 1)) * error
        value = frechet_distance(self._without(None), reference)
        return max(0.0, value - half), value + half

    def _reference(self) -> Statistics:
        mean, covariance = self.reference.mean.to(self.total), self.reference.covariance.to(self.total)
        return Statistics(self.reference.count, mean, covariance)

    def _without(self, group: int | None) -> Statistics:
        """The statistics of all images but those of a group."""
        kept = torch.tensor([g != group for g in range(self.groups)], device=self.total.device)
        return Statistics.from_sums(int(self.count[kept].sum()), self.total[kept].sum(0), self.outer[kept].sum(0))


@torch.inference_mode()
def statistics(images: Iterable[Tensor], features: Features) -> Statistics:
    """The statistics of batches of images [B, 3, H, W] in [0, 1] on the network's device."""
    count, total, outer = 0, torch.zeros(()), torch.zeros(())
    for batch in images:
        values = features(batch).to(torch.float64)
        total, outer = total.to(values) + values.sum(0), outer.to(values) + values.T @ values
        count += len(values)
    return Statistics.from_sums(count, total, outer)


def reference_statistics(images: Iterable[Tensor], features: Features, cache_dir: str | Path, key: str) -> Statistics:
    """The statistics of a reference set, from the cache or, the first time, from its images.

    `key` names the data and how they were prepared (fingerprint, split, size, crop); the network, its
    weights and its resize are added to it. `images` is not touched where the cache has them.
    """
    address = f"{key}\n{features.description}"
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"{features.name}-{digest}.safetensors"
    if path.exists():
        tensors, _ = load_tensors(path)
        return Statistics(int(tensors["count"]), tensors["mean"], tensors["covariance"])
    found = statistics(images, features)
    tensors = {"mean": found.mean, "covariance": found.covariance, "count": torch.tensor(found.count)}
    save_tensors(path, tensors, {"key": key, "features": features.description})
    return Statistics(found.count, found.mean.cpu(), found.covariance.cpu())
