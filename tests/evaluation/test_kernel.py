"""The kernel distance: the formula written out, torchmetrics, no bias, an interval that covers, bounded blocks."""

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.errors import UserError
from ldm.evaluation import kernel as module
from ldm.evaluation.kernel import KernelDistance
from ldm.evaluation.metric import Batch
from ldm.evaluation.protocol import Value
from tests.evaluation.features import Given, GivenReference

DIM = 6


def normal(n: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)) + shift


def batch(x: Tensor) -> Batch:
    return Batch(x, [""] * len(x), torch.arange(len(x)))


def distance(x: Tensor, y: Tensor) -> KernelDistance:
    metric = KernelDistance(Given())
    metric.set_reference(GivenReference(y))
    metric.update(batch(x))
    return metric


def value_of(metric: KernelDistance) -> Value:
    return metric.compute()["Kernel(given)"]


def written_out(x: Tensor, y: Tensor) -> float:
    """Binkowski et al. 2018, equation 4, and Gretton et al. 2012, lemma 6, pair by pair."""
    k = lambda a, b: (float(a.double() @ b.double()) / DIM + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    within = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within + other - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize("block", [3, 4, 100])
def test_it_is_the_formula_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    x, y = normal(11, 0), normal(8, 1, shift=0.3)
    assert value_of(distance(x, y)).value == pytest.approx(written_out(x, y), rel=1e-10)


def test_it_is_torchmetrics_over_one_subset_of_all() -> None:
    class Pixels(nn.Module):
        num_features = DIM

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, 0, 0]

    x, y = normal(40, 0), normal(40, 1, shift=0.3)
    theirs = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=40)
    theirs.update(y[:, :, None, None], real=True)
    theirs.update(x[:, :, None, None], real=False)
    assert value_of(distance(x, y)).value == pytest.approx(float(theirs.compute()[0]), rel=1e-4)


def test_batches_add_up() -> None:
    x, y = normal(30, 0), normal(20, 1)
    whole, parts = distance(x, y), distance(x[:7], y)
    parts.update(batch(x[7:]))
    assert value_of(parts)[:3] == pytest.approx(value_of(whole)[:3], rel=1e-12)


def test_it_has_no_bias_and_its_interval_is_as_wide_as_repetitions_vary() -> None:
    reference = normal(2000, 99)
    metric = KernelDistance(Given())
    metric.set_reference(GivenReference(reference))
    values, halves = [], []
    for seed in range(80):
        metric.reset()
        metric.update(batch(normal(60, seed, shift=0.5)))
        value = value_of(metric)
        assert value.ci_low is not None and value.ci_high is not None
        assert value.ci_low <= value.value <= value.ci_high
        values.append(value.value)
        halves.append(value.ci_high - value.value)
    large = value_of(distance(normal(4000, 1000, shift=0.5), reference)).value
    spread = float(torch.tensor(values).std())
    assert sum(values) / 80 == pytest.approx(large, abs=3 * spread / 80**0.5)
    assert sum(halves) / 80 == pytest.approx(2.001 * spread, rel=0.3)  # Student, 59 degrees


def test_the_jackknife_is_the_distance_without_each_image() -> None:
    x, y = normal(9, 0), normal(7, 1, shift=0.3)
    without = torch.tensor([written_out(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(9)])
    error = float((8 / 9 * (without - without.mean()).square().sum()).sqrt())
    value, low, high, _ = value_of(distance(x, y))
    assert low is not None and high is not None
    assert high - value == pytest.approx(2.306 * error, rel=1e-3)
    assert value - low == pytest.approx(high - value)


def test_a_shift_that_a_mean_does_not_see_is_seen() -> None:
    x = normal(500, 0)
    alike, wider = value_of(distance(normal(500, 1), x)), value_of(distance(normal(500, 1) * 1.3, x))
    assert alike.ci_low is not None and alike.ci_high is not None and wider.ci_low is not None
    assert alike.ci_low < 0 < alike.ci_high
    assert wider.ci_low > 0


def test_too_few_images_and_other_features_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2 reference"):
        distance(normal(5, 0), normal(1, 0))
    for n in (1, 2):
        with pytest.raises(UserError, match=f"at least 3 images, not {n}"):
            distance(normal(n, 0), normal(5, 1)).compute()
    with pytest.raises(UserError, match="has 6 features"):
        distance(torch.zeros(4, 5), normal(5, 1))
