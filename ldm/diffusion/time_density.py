"""Time densities: how often training visits each noise level."""

from abc import ABC, abstractmethod
from math import gcd

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule, shifted
from ldm.errors import UserError

GOLDEN = (5**0.5 - 1) / 2


class TimeDensity(ABC):
    """A density of times, by its inverse distribution function."""

    @abstractmethod
    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """Times [B] (float64) for u [B] uniform in [0, 1)."""


class Uniform(TimeDensity):
    """Every time of the schedule equally often."""

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return schedule.draw(u)


class LogitNormal(TimeDensity):
    """t / t_max is the sigmoid of a normal number (Esser et al. 2024, eq. 19): more of the middle levels."""

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise UserError(f"std={std}: expected a number above 0")
        self.mean, self.std = mean, std

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        t = torch.sigmoid(normal_quantile(u, self.mean, self.std))
        return schedule.nearest(schedule.t_min + t * (schedule.t_max - schedule.t_min))


class LogNormal(TimeDensity):
    """log(sigma / alpha) is a normal number (Karras et al. 2022, table 1, EDM: -1.2, 1.2).

    It is cut off at the schedule's ends, so that no level is visited more often than its neighbours.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        if std <= 0:
            raise UserError(f"std={std}: expected a number above 0")
        self.mean, self.std = mean, std

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64, device=u.device)
        low, high = torch.special.ndtr((schedule(ends).log_snr / -2 - self.mean) / self.std)
        between = low + u.to(torch.float64) * (high - low)
        t = schedule.time_of_log_snr(-2 * normal_quantile(between, self.mean, self.std))
        return schedule.nearest(t.clamp(schedule.t_min, schedule.t_max))


class ResolutionShifted(TimeDensity):
    """Another density, its times moved towards the noise, as larger pictures need (Esser et al. 2024, eq. 23).

    The same noise hides less of a larger picture. `pixels` of the training pictures over the `base_pixels` that
    the other density is meant for give shift = sqrt(pixels / base_pixels): 1024^2 over 256^2 gives 4.
    """

    def __init__(self, density: TimeDensity, pixels: float, base_pixels: float) -> None:
        if pixels <= 0 or base_pixels <= 0:
            raise UserError(f"pixels={pixels}, base_pixels={base_pixels}: expected numbers above 0")
        self.density, self.shift = density, (pixels / base_pixels) ** 0.5

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        t = shifted(self.density(u, schedule), schedule, self.shift)
        return schedule.nearest(t).clamp(schedule.t_min, schedule.t_max)


def normal_quantile(u: Tensor, mean: float, std: float) -> Tensor:
    """The u-quantiles of N(mean, std^2), float64; finite at 0 and 1 too."""
    inside = u.to(torch.float64).clamp(2.0**-25, 1 - 2.0**-25)
    quantile: Tensor = torch.special.ndtri(inside)
    return mean + std * quantile


def stratified(u: Tensor, positions: Tensor, global_batch: int) -> Tensor:
    """u [B] in [0, 1), each in a different stratum, so that a global batch visits all of a density evenly.

    The sample at a position takes the stratum position k mod N, k next to N / golden ratio and without a common
    factor with N = `global_batch`: every position another one, and consecutive positions, which are those
    of a rank, are spread over all of [0, 1).
    """
    k = max(1, round(global_batch * GOLDEN))
    while gcd(k, global_batch) > 1:
        k += 1
    stratum: Tensor = (positions.to(u.device) * k) % global_batch
    return stratum.add(u.to(torch.float64)) / global_batch
