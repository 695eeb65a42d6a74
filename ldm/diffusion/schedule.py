"""Noise schedules: the level (alpha, sigma) at time t, where `z_t = alpha x0 + sigma eps`.

Time is a real number in the unit of the schedule: 0 to 999 for the discrete 1000-step schedules of DDPM and
Stable Diffusion, 0 to 1 for rectified flow, the deviation of the noise for EDM. One more time, `t_clean`, stands
for the data itself.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError


class Level(NamedTuple):
    """The noise level at a time: `alpha`, `sigma` and their derivatives by t, each shaped like t (float64)."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def log_snr(self) -> Tensor:
        """log(alpha^2 / sigma^2)."""
        return 2.0 * (torch.log(self.alpha) - torch.log(self.sigma))

    def like(self, x: Tensor) -> "Level":
        """The same level in x's dtype and device, [B] shaped to multiply x [B, ...] by broadcasting."""
        return Level(*(broadcast(part, x) for part in self))


def broadcast(value: Tensor, x: Tensor) -> Tensor:
    """`value` [B] (or a scalar) in x's dtype and device, shaped [B, 1, ...] to x's number of dimensions."""
    value = value.to(device=x.device, dtype=x.dtype, non_blocking=True)  # from the CPU without waiting for the GPU
    return value.view(-1, *([1] * (x.ndim - 1))) if value.ndim else value


class Schedule(ABC):
    """A noise schedule: a level for every time from t_min to t_max, noise growing with t."""

    t_clean: float
    t_min: float
    t_max: float

    @abstractmethod
    def __call__(self, t: Tensor) -> Level:
        """The level at times t (any shape); at `t_clean` exactly (alpha, sigma) = (1, 0)."""

    @abstractmethod
    def draw(self, u: Tensor) -> Tensor:
        """Times that are uniform over the schedule for u uniform in [0, 1)."""

    def nearest(self, t: Tensor) -> Tensor:
        """The times nearest to t that a network is trained at: t itself in continuous time."""
        return t

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """The input of the network's time embedding: t on the scale 0 to 1000, float32."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The time t at which the log signal-to-noise ratio is `log_snr` (the inverse of `Level.log_snr`)."""


class Discrete(Schedule):
    """A variance-preserving schedule of `len(betas)` steps (DDPM, Ho et al. 2020, eq. 4).

    alpha(t)^2 is the cumulative product of 1 - beta. Between the integer times log-SNR is interpolated
    linearly, as k-diffusion does, so that fractional times have a level and derivatives too.
    """

    t_clean = -1.0
    t_min = 0.0

    def __init__(self, betas: np.ndarray) -> None:
        if betas.ndim != 1 or len(betas) < 2 or betas.min() <= 0 or betas.max() >= 1:
            raise UserError("betas: expected at least two numbers inside (0, 1)")
        self.alphas_cumprod = np.cumprod(1.0 - betas.astype(np.float64))
        self.t_max = float(len(betas) - 1)
        log_snr = np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)
        self._values = torch.tensor(log_snr, dtype=torch.float64, device="cpu")

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def __call__(self, t: Tensor) -> Level:
        clean = t < 0
        log_snr, slope = self._interpolated(t)
        alpha2, sigma2 = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        alpha = torch.where(clean, 1.0, alpha2.sqrt())
        sigma = torch.where(clean, 0.0, sigma2.sqrt())
        # d alpha / d log_snr = alpha sigma^2 / 2 and d sigma / d log_snr = -sigma alpha^2 / 2
        return Level(alpha, sigma, alpha * sigma2 * slope / 2, -sigma * alpha2 * slope / 2)

    def draw(self, u: Tensor) -> Tensor:
        """Integer times, each of 0 ... T-1 equally likely."""
        return (u.to(torch.float64) * len(self)).floor()

    def nearest(self, t: Tensor) -> Tensor:
        return t.round()

    def network_time(self, t: Tensor) -> Tensor:
        return (t * (1000.0 / len(self))).to(torch.float32)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._time_of(log_snr)

    def _interpolated(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The table's value at times t, and its slope there."""
        t = t.to(torch.float64).clamp(0, self.t_max)
        table = self._table(t.device)
        low = t.floor().long().clamp(max=len(self) - 2)
        slope = table[low + 1] - table[low]
        return table[low] + (t - low) * slope, slope

    def _time_of(self, value: Tensor) -> Tensor:
        """The time at which the table, which falls, has a value."""
        rising = -self._table(value.device)
        wanted = (-value.to(torch.float64)).clamp(rising[0], rising[-1])
        high = torch.searchsorted(rising, wanted).clamp(1, len(self) - 1)
        return high - 1 + (wanted - rising[high - 1]) / (rising[high] - rising[high - 1])

    def _table(self, device: torch.device) -> Tensor:
        if self._values.device != device:
            self._values = self._values.to(device)
        return self._values


class ScaledLinear(Discrete):
    """Stable Diffusion's schedule: betas are the squares of a linspace between the roots of the ends.

    CompVis calls it `linear`, diffusers `scaled_linear`. SD: 0.00085 to 0.012 in 1000 steps.
    """

    def __init__(self, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> None:
        super().__init__(np.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=np.float64) ** 2)


class Linear(Discrete):
    """DDPM's schedule: betas on a straight line (Ho et al. 2020, section 4: 1e-4 to 0.02)."""

    def __init__(self, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> None:
        super().__init__(np.linspace(beta_start, beta_end, steps, dtype=np.float64))


class Cosine(Discrete):
    """alpha^2 = cos^2((t / T + s) / (1 + s) pi / 2), betas at most `beta_max` (Nichol and Dhariwal 2021, eq. 17)."""

    def __init__(self, steps: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> None:
        f = np.cos((np.arange(steps + 1, dtype=np.float64) / steps + s) / (1 + s) * np.pi / 2) ** 2
        super().__init__(np.minimum(1.0 - f[1:] / f[:-1], beta_max))


class ZeroTerminalSNR(Discrete):
    """Another schedule, rescaled so that its last level has no signal (Lin et al. 2023, algorithm 1).

    alpha is shifted to 0 at the last time and stretched to what it was at the first. Between the integer times
    the angle atan(alpha / sigma) is linear, since log-SNR is infinite at the end.
    """

    def __init__(self, schedule: Discrete) -> None:
        alpha = np.sqrt(schedule.alphas_cumprod)
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        self.alphas_cumprod = alpha**2
        self.t_max = schedule.t_max
        angle = np.arctan2(alpha, np.sqrt(1.0 - alpha**2))
        self._values = torch.tensor(angle, dtype=torch.float64, device="cpu")

    def __call__(self, t: Tensor) -> Level:
        clean = t < 0
        angle, slope = self._interpolated(t)
        alpha, sigma = torch.where(clean, 1.0, angle.sin()), torch.where(clean, 0.0, angle.cos())
        return Level(alpha, sigma, sigma * slope, -alpha * slope)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._time_of(torch.atan(torch.exp(log_snr.to(torch.float64) / 2)))


class VariancePreserving(Schedule):
    """DDPM's schedule in continuous time: beta(t) linear, t from 0 to 1 (Song et al. 2021, appendix B, "VP SDE").

    log alpha^2 = -(beta_min t + (beta_max - beta_min) t^2 / 2). Training and grids begin at t = 0.001, since
    d sigma / dt is infinite at 0.
    """

    t_clean = 0.0
    t_min = 1e-3
    t_max = 1.0

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min < beta_max:
            raise UserError(f"beta_min={beta_min}, beta_max={beta_max}: expected 0 < beta_min < beta_max")
        self.beta_min, self.slope = beta_min, beta_max - beta_min

    def __call__(self, t: Tensor) -> Level:
        t = t.to(torch.float64)
        exponent = self.beta_min * t + self.slope * t**2 / 2
        alpha, sigma = torch.exp(-exponent / 2), torch.sqrt(-torch.expm1(-exponent))
        d_alpha = -(self.beta_min + self.slope * t) * alpha / 2
        return Level(alpha, sigma, d_alpha, -d_alpha * alpha / sigma)

    def draw(self, u: Tensor) -> Tensor:
        return self.t_min + u.to(torch.float64) * (self.t_max - self.t_min)

    def network_time(self, t: Tensor) -> Tensor:
        return (t * 1000.0).to(torch.float32)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        exponent = torch.nn.functional.softplus(-log_snr.to(torch.float64))
        return (torch.sqrt(self.beta_min**2 + 2 * self.slope * exponent) - self.beta_min) / self.slope


class RectifiedFlow(Schedule):
    """The straight path alpha = 1 - t, sigma = t (Liu et al. 2022; Lipman et al. 2022), t from 0 to 1."""

    t_clean = 0.0
    t_min = 0.0
    t_max = 1.0

    def __call__(self, t: Tensor) -> Level:
        t = t.to(torch.float64)
        one = torch.ones_like(t)
        return Level(1.0 - t, t, -one, one)

    def draw(self, u: Tensor) -> Tensor:
        return u.to(torch.float64)

    def network_time(self, t: Tensor) -> Tensor:
        return (t * 1000.0).to(torch.float32)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr.to(torch.float64) / 2)


class VarianceExploding(Schedule):
    """alpha = 1, sigma = t, the noise's deviation itself (Karras et al. 2022, table 1, EDM): 0.002 to 80.

    "Uniform" is uniform in log sigma, and the network's time is log sigma, as in EDM up to the
    scale: 0 at sigma_min, 1000 at sigma_max. z is not of unit variance: use it with prediction=edm.
    """

    t_clean = 0.0

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: expected 0 < sigma_min < sigma_max")
        self.t_min, self.t_max = sigma_min, sigma_max
        self._log_range = math.log(sigma_max / sigma_min)

    def __call__(self, t: Tensor) -> Level:
        t = t.to(torch.float64)
        one = torch.ones_like(t)
        return Level(one, t, torch.zeros_like(t), one)

    def draw(self, u: Tensor) -> Tensor:
        return self.t_min * torch.exp(u.to(torch.float64) * self._log_range)

    def network_time(self, t: Tensor) -> Tensor:
        return (torch.log(t / self.t_min) * (1000.0 / self._log_range)).to(torch.float32)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr.to(torch.float64) / 2)


def shifted(t: Tensor, schedule: Schedule, shift: float) -> Tensor:
    """Times t moved towards the noise: u becomes shift u / (1 + (shift - 1) u), where u = 0 is clean, u = 1 t_max.

    Esser et al. 2024, eq. 23: in rectified flow it multiplies sigma / alpha by `shift`, the square root of the
    ratio of the number of pixels. Both ends stay where they are.
    """
    span = schedule.t_max - schedule.t_clean
    u = (t - schedule.t_clean) / span
    return schedule.t_clean + span * (shift * u / (1.0 + (shift - 1.0) * u))
