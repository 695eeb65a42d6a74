"""The kernel distance between the features of generated images and of a reference set.

KID where the features are Inception's (Binkowski et al. 2018): the squared maximum mean discrepancy with the
kernel `k(x, y) = (x'y / D + 1)^3`. In float64, a block of the kernel matrix at a time.

It is the unbiased estimate over all pairs. The mean over random subsets that other tools give (100 of 1000
images) has the same expectation and a larger variance, and depends on how the subsets are drawn.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from ldm.errors import UserError
from ldm.evaluation.features import Features, check_features
from ldm.evaluation.interval import jackknife
from ldm.evaluation.metric import Batch, Metric, Reference
from ldm.evaluation.protocol import Value

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


class KernelDistance(Metric):
    """The squared maximum mean discrepancy between pictures and reference pictures in feature space, unbiased.

    "KID" over FID's Inception. The state is the features themselves, joined over processes; 50,000 of 2048 take
    0.4 GB. An unbiased estimate of a distance near 0 is as often negative. The interval leaves out one image at a time
    (jackknife), whose values follow exactly from the sums of the kernel matrix's rows: it is how far the number would
    move with other seeds, for this N and this reference.
    """

    higher_is_better = False
    needs_reference = True

    reference: Tensor  # features [M, D]
    points: list[Tensor] | Tensor

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features
        self._source: Reference | None = None
        self.add_state("points", [], dist_reduce_fx="cat")

    def set_reference(self, reference: Reference) -> None:
        if reference is not self._source:
            self.reference = reference.features(self.features).to(self.features.device)
            m = len(self.reference)
            if m < 2:
                raise UserError(f"a kernel distance needs at least 2 reference images, not {m}")
            self._mean_within_reference = float(sums_within(self.reference).sum()) / (m * (m - 1))
            self._source = reference
        self.reset()

    def update(self, batch: Batch) -> None:
        features = batch.features(self.features)
        check_features(features, self.reference.shape[1])
        assert isinstance(self.points, list)
        self.points.append(features.detach().to(self.reference.device, torch.float32, copy=True))

    def compute(self) -> dict[str, Value]:
        x = dim_zero_cat(self.points)
        n, m = len(x), len(self.reference)
        if n < 3:
            raise UserError(f"the interval of a kernel distance needs at least 3 images, not {n}")
        within, between = sums_within(x), sums_between(x, self.reference)  # [N], of each image
        # the unbiased estimate of Gretton et al. 2012, lemma 6
        value = float(within.sum()) / (n * (n - 1)) + self._mean_within_reference - 2.0 * float(between.sum()) / (n * m)
        without_within = (within.sum() - 2.0 * within) / ((n - 1) * (n - 2))
        without_between = (between.sum() - between) / ((n - 1) * m)
        half = jackknife(without_within - 2.0 * without_between)  # the reference's own part is the same in all
        return {self.features.kernel_label: Value(value, value - half, value + half)}

    def descriptions(self) -> Mapping[str, str]:
        return {self.features.kernel_label: self.features.description}
