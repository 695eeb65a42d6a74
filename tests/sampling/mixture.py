"""Data whose exact denoiser is known: a mixture of three round Gaussians in the plane."""

from functools import cache

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.prediction import Denoised
from ldm.diffusion.schedule import Schedule

MEANS = torch.tensor([[1.0, 0.5], [-1.2, 0.3], [0.2, -1.1]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STD = 0.35

MEAN = WEIGHTS @ MEANS
COVARIANCE = STD**2 * torch.eye(2, dtype=torch.float64) + (MEANS - MEAN).T @ torch.diag(WEIGHTS) @ (MEANS - MEAN)

STARTS = torch.tensor([[0.9, -0.4], [-1.3, 0.2], [0.1, 1.7], [-0.2, -0.9]], dtype=torch.float64)
"""Unit noise to start from, points from which trajectories end at all three means."""


def data_given(z: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x0 | z] for z [B, 2] of the mixture at a level, by Bayes' rule over its parts."""
    variance = alpha**2 * STD**2 + sigma**2
    offsets = z[:, None] - alpha * MEANS  # [B, 3, 2]
    share = torch.softmax(WEIGHTS.log() - offsets.square().sum(-1) / (2 * variance), dim=1)
    return (share[..., None] * (MEANS + alpha * STD**2 / variance * offsets)).sum(1)


@cache
def level_at(schedule: Schedule, t: float) -> tuple[float, float]:
    """(alpha, sigma) at a time."""
    level = schedule(torch.tensor(t, dtype=torch.float64))
    return float(level.alpha), float(level.sigma)


def exact(schedule: Schedule) -> Denoise:
    """The mixture's denoiser."""

    def denoise(z: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = level_at(schedule, float(t[0]))
        x0 = data_given(z, alpha, sigma)
        return Denoised(x0, (z - alpha * x0) / sigma)

    return denoise


@cache
def flowed(schedule: Schedule, first: float, last: float) -> tuple[Tensor, Tensor]:
    """STARTS at time `first` [4, 2], and where the probability-flow equation takes them at `last`.

    dy/ds = eps in y = z / alpha, s = sigma / alpha (Karras et al. 2022, eq. 1), by DOP853 at rtol 1e-12.
    """
    levels = schedule(torch.tensor([first, last], dtype=torch.float64))
    (s, s_end), (alpha, alpha_end) = (levels.sigma / levels.alpha).tolist(), levels.alpha.tolist()
    y = torch.sqrt(torch.tensor(1 + s**2)) * STARTS

    def slope(log_s: float, y: np.ndarray) -> np.ndarray:  # d y / d log s = s eps = y - x0
        points = torch.from_numpy(y).view(-1, 2)
        return (points - data_given(points, 1.0, float(np.exp(log_s)))).flatten().numpy()

    found = solve_ivp(slope, np.log((s, s_end)), y.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-14)
    return alpha * y, alpha_end * torch.from_numpy(found.y[:, -1]).view(-1, 2)
