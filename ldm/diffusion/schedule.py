"""Noise schedules: the level (alpha, sigma) at time t, where `z_t = alpha x0 + sigma eps`.

Time is a real number in the schedule's own unit: 0 to 999 for the discrete 1000-step schedules of DDPM and
Stable Diffusion, 0 to 1 for rectified flow. One more time, `t_clean`, stands for the data itself.
"""

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
    value = value.to(device=x.device, dtype=x.dtype)
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

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """What the network's time embedding is given: t on the scale 0 to 1000, float32."""

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
        self._log_snr = torch.tensor(log_snr, dtype=torch.float64, device="cpu")

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def __call__(self, t: Tensor) -> Level:
        t = t.to(torch.float64)
        table = self._table(t.device)
        clean = t < 0
        low = t.clamp(0, self.t_max).floor().long().clamp(max=len(self) - 2)
        slope = table[low + 1] - table[low]
        log_snr = table[low] + (t.clamp(0, self.t_max) - low) * slope
        alpha2, sigma2 = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        alpha = torch.where(clean, 1.0, alpha2.sqrt())
        sigma = torch.where(clean, 0.0, sigma2.sqrt())
        # d alpha / d log_snr = alpha sigma^2 / 2 and d sigma / d log_snr = -sigma alpha^2 / 2
        return Level(alpha, sigma, alpha * sigma2 * slope / 2, -sigma * alpha2 * slope / 2)

    def draw(self, u: Tensor) -> Tensor:
        """Integer times, each of 0 ... T-1 equally likely."""
        return (u.to(torch.float64) * len(self)).floor()

    def network_time(self, t: Tensor) -> Tensor:
        return (t * (1000.0 / len(self))).to(torch.float32)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        rising = -self._table(log_snr.device)
        wanted = (-log_snr.to(torch.float64)).clamp(rising[0], rising[-1])
        high = torch.searchsorted(rising, wanted).clamp(1, len(self) - 1)
        return high - 1 + (wanted - rising[high - 1]) / (rising[high] - rising[high - 1])

    def _table(self, device: torch.device) -> Tensor:
        if self._log_snr.device != device:
            self._log_snr = self._log_snr.to(device)
        return self._log_snr


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
