"""The interface of a sampler: a loop over the steps of a time grid that sees `denoise` and the noise levels alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import sqrt
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule

Noise = Callable[[tuple[int, ...]], Tensor]
"""Draws standard normal noise [B, *shape]; see `ldm.sampling.noise.ImageNoise`."""

OnStep = Callable[[int], None]
"""Called after each step with the number of steps done."""


class Point(NamedTuple):
    """A time of the grid with its noise level as plain numbers."""

    t: Tensor
    """[B], float64, on the CPU: the time for every row of z."""
    alpha: float
    sigma: float
    ratio: float
    """s = sigma / alpha, the deviation of the noise in z / alpha (k-diffusion's sigma); inf without signal."""
    half_log_snr: float
    """lambda = log(alpha / sigma): inf at the data, -inf without signal."""


@dataclass(frozen=True)
class Steps:
    """The steps of a run, (from, to) each; every step starts where the last one ended."""

    points: Sequence[Point]
    on_step: OnStep

    def __len__(self) -> int:
        return len(self.points) - 1

    def __iter__(self) -> Iterator[tuple[Point, Point]]:
        """The steps in order; `on_step` is called when the loop's body is done with one."""
        for done, step in enumerate(pairwise(self.points), start=1):
            yield step
            self.on_step(done)


def steps_of(times: Tensor, schedule: Schedule, rows: int, on_step: OnStep = lambda done: None) -> Steps:
    """The steps of a time grid [steps + 1] (falling, see `ldm.sampling.grid`) for `rows` images."""
    times = times.to(device="cpu", dtype=torch.float64)
    alpha, sigma, _, _ = schedule(times)
    numbers = (alpha, sigma, sigma / alpha, torch.log(alpha / sigma))
    rows_t = times[:, None].expand(-1, rows).unbind()
    return Steps(list(map(Point, rows_t, *(number.tolist() for number in numbers))), on_step)


class Sampler(ABC):
    """Takes z from the first step's noise level to a sample at the last one's."""

    @abstractmethod
    def __call__(self, denoise: Denoise, z: Tensor, steps: Steps, noise: Noise) -> Tensor:
        """The sample, shaped like z [B, ...].

        Args:
            denoise: (z, t [B]) -> (x0, eps).
            z: the start, alpha x0 + sigma eps at the first step's level; never changed in place.
            steps: the steps of the run (see `steps_of`); loop over them once.
            noise: draws noise of a given shape per image (only stochastic samplers call it).
        """


def posterior_deviation(now: Point, then: Point) -> float:
    """The deviation of z at `then`, given z at `now` and x0 (Ho et al. 2020, eq. 7; Song et al. 2020, eq. 16)."""
    if then.sigma == 0:
        return 0.0
    correlation = now.alpha * then.sigma / (now.sigma * then.alpha)
    return then.sigma * sqrt(max(1.0 - correlation**2, 0.0))


def add_noise(z: Tensor, deviation: float, noise: Noise) -> Tensor:
    """z [B, ...] with noise of this deviation added; where that is 0, z itself, and nothing is drawn."""
    return z if deviation == 0 else z + deviation * noise(z.shape[1:])


def weighted_sum(weights: Iterable[float], tensors: Iterable[Tensor]) -> Tensor:
    """sum_k weight_k tensor_k."""
    return reduce(add, (weight * tensor for weight, tensor in zip(weights, tensors, strict=True)))


def start(z: Tensor, times: Tensor, schedule: Schedule) -> Tensor:
    """Unit noise z [B, ...] scaled to the deviation that normalised data has at the grid's first time."""
    level = schedule(times[:1])
    scale = (level.alpha**2 + level.sigma**2).sqrt()
    return z * float(scale)
