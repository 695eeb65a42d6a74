"""What a sampler is: a loop over the steps of a time grid that sees `denoise` and the noise levels, nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule

Noise = Callable[[tuple[int, ...]], Tensor]
"""NoiseKeys standard normal noise [B, *shape]; see `ldm.sampling.noise.ImageNoise`."""

OnStep = Callable[[int], None]
"""Told the number of steps done, after each."""


class Point(NamedTuple):
    """A time of the grid with its level as plain numbers, so that a step is arithmetic on few tensors."""

    t: Tensor
    """[B], float64, on the CPU: the time for every row of z."""
    alpha: float
    sigma: float
    ratio: float
    """sigma / alpha, the deviation of the noise in z / alpha (k-diffusion's sigma); inf without signal."""
    half_log_snr: float
    """lambda = log(alpha / sigma): inf at the data, -inf without signal."""


Steps = Sequence[tuple[Point, Point]]
"""From where to where each step goes; each begins where the last one ended."""


def steps_of(times: Tensor, schedule: Schedule, rows: int) -> Steps:
    """The steps of a time grid [steps + 1] (falling, see `ldm.sampling.grid`) for `rows` images.

    All levels are computed at once, before the first step.
    """
    times = times.to(device="cpu", dtype=torch.float64)
    alpha, sigma, _, _ = schedule(times)
    of_rows = times[:, None].expand(-1, rows).unbind()
    numbers = (alpha, sigma, sigma / alpha, torch.log(alpha / sigma))
    return list(pairwise(map(Point, of_rows, *(number.tolist() for number in numbers))))


class Sampler(ABC):
    """Takes z at the first step's level to a sample at the last one's."""

    @abstractmethod
    def __call__(
        self,
        denoise: Denoise,
        z: Tensor,
        steps: Steps,
        noise: Noise,
        on_step: OnStep = lambda done: None,
    ) -> Tensor:
        """The sample, shaped like z [B, ...].

        Args:
            denoise: (z, t [B]) -> (x0, eps).
            z: the start, alpha x0 + sigma eps at the first step's level; never changed in place.
            steps: from where to where each step goes (see `steps_of`).
            noise: draws noise of a given shape per image (stochastic samplers alone call it).
            on_step: called after each step.
        """


def posterior_deviation(now: Point, then: Point) -> float:
    """The deviation of z at `then`, given z at `now` and x0 (Ho et al. 2020, eq. 7; Song et al. 2020, eq. 16)."""
    if then.sigma == 0:
        return 0.0
    kept = now.alpha * then.sigma / (now.sigma * then.alpha)
    return then.sigma * sqrt(max(1.0 - kept**2, 0.0))


def add_noise_(z: Tensor, deviation: float, noise: Noise) -> Tensor:
    """z [B, ...], to which fresh noise of this deviation is added in place; nothing is drawn where that is 0."""
    if deviation == 0:
        return z
    return z.add_(noise(z.shape[1:]), alpha=deviation)


def start(z: Tensor, times: Tensor, schedule: Schedule) -> Tensor:
    """Unit noise z [B, ...] scaled to the deviation that normalised data has at the grid's first time."""
    level = schedule(times[:1])
    scale = (level.alpha**2 + level.sigma**2).sqrt()
    return z * float(scale)
