"""What a sampler is: a loop over a time grid that sees `denoise` and the schedule, nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule

Noise = Callable[[tuple[int, ...]], Tensor]
"""Draws standard normal noise [B, *shape]; see `ldm.sampling.noise.ImageNoise`."""

OnStep = Callable[[int], None]
"""Told the number of steps done, after each."""


class Sampler(ABC):
    """Takes z at the grid's first time to a sample at its last."""

    @abstractmethod
    def __call__(
        self,
        denoise: Denoise,
        z: Tensor,
        times: Tensor,
        schedule: Schedule,
        noise: Noise,
        on_step: OnStep = lambda done: None,
    ) -> Tensor:
        """The sample, shaped like z [B, ...].

        Args:
            denoise: (z, t [B]) -> (x0, eps).
            z: the start, alpha x0 + sigma eps at times[0]; never changed in place.
            times: [steps + 1], falling (see `ldm.sampling.grid`).
            schedule: gives the level at each time.
            noise: draws noise of a given shape per image (stochastic samplers alone call it).
            on_step: called after each step.
        """


def start(z: Tensor, times: Tensor, schedule: Schedule) -> Tensor:
    """Unit noise z [B, ...] scaled to the deviation that normalised data has at the grid's first time."""
    level = schedule(times[:1])
    scale = (level.alpha**2 + level.sigma**2).sqrt()
    return z * float(scale)


def batch_time(t: Tensor, z: Tensor) -> Tensor:
    """The time t (a scalar) for every row of z: [B], float64, on z's device."""
    return torch.full((len(z),), float(t), dtype=torch.float64, device=z.device)


def steps_of(times: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The pairs (t, next t) of a grid."""
    return list(pairwise(times.unbind()))
