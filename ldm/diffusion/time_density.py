"""Which noise levels a training run visits: the density of t."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion.schedule import Discrete, Schedule
from ldm.errors import UserError


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
        u = u.to(torch.float64).clamp(2.0**-25, 1 - 2.0**-25)
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        t = schedule.t_min + t * (schedule.t_max - schedule.t_min)
        return t.round() if isinstance(schedule, Discrete) else t
