"""Intervals: coverage of known distributions, and edges."""

import pytest
import torch

from ldm.errors import UserError
from ldm.evaluation.interval import of_mean, wilson


@pytest.mark.parametrize("share", [0.05, 0.3, 0.97])
def test_wilson_covers_the_true_share(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.binomial(torch.full((2000,), 200.0), torch.full((2000,), share), generator=generator)
    covered = [low <= share <= high for low, high in (wilson(count, 200) for count in counts.tolist())]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.025)


def test_wilson_at_the_edges() -> None:
    assert wilson(0, 50)[0] == 0.0 < wilson(0, 50)[1] < 0.1
    assert wilson(50, 50)[1] == 1.0 > wilson(50, 50)[0] > 0.9
    for bad in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(UserError, match="a share needs"):
            wilson(*bad)


def test_the_interval_of_a_mean() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 7.0]).double()
    low, high = of_mean(float(values.sum()), float(values.square().sum()), 4)
    half = 1.959964 * float(values.std()) / 2
    assert (low, high) == pytest.approx((3.5 - half, 3.5 + half), rel=1e-6)
    assert of_mean(6.0, 12.0, 3) == pytest.approx((2.0, 2.0))
    with pytest.raises(UserError, match="at least 2 values"):
        of_mean(1.0, 1.0, 1)
