"""What a network predicts, as two coefficients: its output is `a x0 + b eps` at level (alpha, sigma).

One 2x2 system, `z = alpha x0 + sigma eps` and `out = a x0 + b eps`, recovers (x0, eps) for every type:
`det = alpha b - sigma a`, `x0 = (b z - sigma out) / det`, `eps = (alpha out - a z) / det`.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.schedule import Level, Schedule
from ldm.errors import UserError


class Denoised(NamedTuple):
    """The estimates of data and noise in z, each shaped like z [B, ...]: `z = alpha x0 + sigma eps`."""

    x0: Tensor
    eps: Tensor


class Prediction(ABC):
    """A parameterisation: the coefficients (a, b) of the network's output `a x0 + b eps`."""

    @abstractmethod
    def coefficients(self, level: Level) -> tuple[Tensor, Tensor]:
        """(a, b), each shaped like the level's alpha."""

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """The network's target for the pair (x0, eps); the level is shaped like x0."""
        a, b = self.coefficients(level)
        return a * x0 + b * eps

    def solve(self, z: Tensor, out: Tensor, level: Level) -> Denoised:
        """The pair (x0, eps) for which the network's output at z is `out`; the level is shaped like z."""
        a, b = self.coefficients(level)
        det = self.determinant(level)
        return Denoised((b * z - level.sigma * out) / det, (level.alpha * out - a * z) / det)

    def input_scale(self, level: Level) -> Tensor:
        """The factor of z in the network's input, shaped like the level's alpha: 1, except for EDM."""
        return torch.ones_like(level.alpha)

    def determinant(self, level: Level) -> Tensor:
        """alpha b - sigma a; the error of the output is -det / sigma times the error of x0."""
        a, b = self.coefficients(level)
        return level.alpha * b - level.sigma * a

    def check(self, schedule: Schedule) -> None:
        """Raise UserError where the schedule has a level at which the output does not determine x0 and eps."""
        t = torch.linspace(schedule.t_min, schedule.t_max, 1001, dtype=torch.float64, device="cpu")
        level = schedule(t)
        det = self.determinant(level)
        singular = (level.sigma > 0) & ~(det.abs() > 1e-6)
        if bool(singular.any()):
            at = float(t[singular][0])
            raise UserError(
                f"{type(self).__name__} prediction with {type(schedule).__name__} is singular at t = {at:g} "
                f"(alpha = {float(schedule(torch.tensor(at)).alpha):g}): x0 does not follow from the network's "
                "output there. Use prediction=v, edm or flow, or a schedule that keeps some signal."
            )


class Epsilon(Prediction):
    """The noise (Ho et al. 2020): a = 0, b = 1."""

    def coefficients(self, level: Level) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(level.alpha), torch.ones_like(level.alpha)


class X0(Prediction):
    """The data: a = 1, b = 0."""

    def coefficients(self, level: Level) -> tuple[Tensor, Tensor]:
        return torch.ones_like(level.alpha), torch.zeros_like(level.alpha)


class V(Prediction):
    """v = alpha eps - sigma x0 (Salimans and Ho 2022, appendix D): a = -sigma, b = alpha."""

    def coefficients(self, level: Level) -> tuple[Tensor, Tensor]:
        return -level.sigma, level.alpha


class Flow(Prediction):
    """The path's velocity dz/dt (Lipman et al. 2022): a = d alpha / dt, b = d sigma / dt."""

    def coefficients(self, level: Level) -> tuple[Tensor, Tensor]:
        return level.d_alpha, level.d_sigma


class EDM(Prediction):
    """EDM's preconditioning (Karras et al. 2022, table 1 and eq. 7): x0 = c_skip y + c_out F(c_in y).

    There y = x0 + s eps with s = sigma / alpha, c_skip = s_d^2 / (s^2 + s_d^2), c_out = s s_d / sqrt(s^2 + s_d^2)
    and c_in = 1 / sqrt(s^2 + s_d^2), s_d the data's deviation. Solved for F = a x0 + b eps, with
    n = sqrt(sigma^2 + s_d^2 alpha^2), the deviation of z: a = sigma / (s_d n), b = -s_d alpha / n, which is
    finite at alpha = 0 as well and has determinant -n / s_d. The network's input is z / n.
    """

    def __init__(self, sigma_data: float = 1.0) -> None:
        if sigma_data <= 0:
            raise UserError(f"sigma_data={sigma_data}: expected a number above 0 (normalised latents have 1)")
        self.sigma_data = sigma_data

    def coefficients(self, level: Level) -> tuple[Tensor, Tensor]:
        scale = self.input_scale(level)
        return level.sigma * scale / self.sigma_data, -self.sigma_data * level.alpha * scale

    def input_scale(self, level: Level) -> Tensor:
        return (level.sigma**2 + (self.sigma_data * level.alpha) ** 2).rsqrt()
