"""Confidence intervals of means, of shares, and from estimates that leave a part out."""

from statistics import NormalDist

from scipy.stats import t as student
from torch import Tensor

from ldm.errors import UserError

Interval = tuple[float, float]


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """The interval of a share `successes / n` (Wilson 1927); within [0, 1] and not empty at 0 and n."""
    if n < 1 or not 0 <= successes <= n:
        raise UserError(f"a share needs 0 <= successes <= n and n >= 1, not {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def of_mean(total: float, squares: float, n: int, confidence: float = 0.95) -> Interval:
    """The interval of a mean, from the sum and the sum of squares of n values (normal approximation)."""
    if n < 2:
        raise UserError(f"the interval of a mean needs at least 2 values, not {n}")
    mean = total / n
    variance = max(0.0, squares - n * mean * mean) / (n - 1)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * (variance / n) ** 0.5
    return mean - half, mean + half


def jackknife(without: Tensor, confidence: float = 0.95) -> float:
    """The half width of the interval of an estimate, from the g estimates [g] that leave out one of g groups each.

    Delete-a-group jackknife (Kott 2001), Student's t with g - 1 degrees of freedom.
    """
    g = len(without)
    error = float(((g - 1) / g * (without - without.mean()).square().sum()).sqrt())
    return float(student.ppf(0.5 + confidence / 2, g - 1)) * error
