"""What a network predicts, as two coefficients: its output is `a x0 + b eps` at level (alpha, sigma).

One 2x2 system, `z = alpha x0 + sigma eps` and `out = a x0 + b eps`, gives (x0, eps) back for every type:
`det = alpha b - sigma a`, `x0 = (b z - sigma out) / det`, `eps = (alpha out - a z) / det`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.schedule import Level, Schedule
from ldm.errors import UserError


class Solution(NamedTuple):
    """x0 and eps of two tensors: each the factors of the one and of the other. Plain numbers, for one time."""

    x0: tuple[float, float]
    eps: tuple[float, float]


THE_PAIR_ITSELF = Solution((1.0, 0.0), (0.0, 1.0))


class Denoised:
    """An estimate of the data and of the noise in z, each shaped like z: `z = alpha x0 + sigma eps`.

    It is held as two tensors of which x0 and eps are combinations with known factors (the pair itself, or z and
    the network's output), so that a sampler pays for the combination that it asks for and for no other.
    """

    __slots__ = ("_eps", "_u", "_v", "_x0")

    def __init__(self, u: Tensor, v: Tensor, solution: Solution = THE_PAIR_ITSELF) -> None:
        """Of (x0, eps); or of (z, the network's output) and what they say of x0 and eps."""
        self._u, self._v = u, v
        self._x0, self._eps = solution

    @property
    def x0(self) -> Tensor:
        """The data, shaped like z. May share memory with the network's output: never change it in place."""
        return combined(self._u, self._v, *self._x0)

    @property
    def eps(self) -> Tensor:
        """The noise, shaped like z. May share memory with the network's output: never change it in place."""
        return combined(self._u, self._v, *self._eps)

    def mix(self, alpha: float, sigma: float) -> Tensor:
        """alpha x0 + sigma eps, a new tensor: where the estimate lies at another noise level."""
        (x0_u, x0_v), (eps_u, eps_v) = self._x0, self._eps
        return (self._u * (alpha * x0_u + sigma * eps_u)).add_(self._v, alpha=alpha * x0_v + sigma * eps_v)

    def add_to_(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        """z, to which alpha x0 + sigma eps is added in place; z may be the one estimated at: that ends the estimate."""
        (x0_u, x0_v), (eps_u, eps_v) = self._x0, self._eps
        for tensor, factor in ((self._u, alpha * x0_u + sigma * eps_u), (self._v, alpha * x0_v + sigma * eps_v)):
            if factor != 0.0:
                z.add_(tensor, alpha=factor)
        return z

    def halves(self) -> tuple["Denoised", "Denoised"]:
        """The estimates of the first and of the second half of the rows."""
        (u_1, u_2), (v_1, v_2) = self._u.chunk(2), self._v.chunk(2)
        factors = Solution(self._x0, self._eps)
        return Denoised(u_1, v_1, factors), Denoised(u_2, v_2, factors)

    def lerp(self, end: "Denoised", weight: float) -> "Denoised":
        """The estimate `weight` of the way from this one to `end` (0: this one, 1: `end`), both of the same z."""
        if (self._x0, self._eps) == (end._x0, end._eps):
            u, v = self._u.lerp(end._u, weight), self._v.lerp(end._v, weight)
            return Denoised(u, v, Solution(self._x0, self._eps))
        return Denoised(self.x0.lerp(end.x0, weight), self.eps.lerp(end.eps, weight))

    def __iter__(self) -> Iterator[Tensor]:
        """`x0, eps = denoised`."""
        yield self.x0
        yield self.eps


def combined(u: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """a u + b v; u or v itself where that is the sum."""
    if b == 0.0:
        return u if a == 1.0 else u * a
    if a == 0.0:
        return v if b == 1.0 else v * b
    return (u * a).add_(v, alpha=b)


class Prediction(ABC):
    """A parameterisation: the coefficients (a, b) of what the network predicts."""

    @abstractmethod
    def coefficients(self, level: Level) -> tuple[Tensor, Tensor]:
        """(a, b), each shaped like the level's alpha."""

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """What the network should output for the pair (x0, eps); the level is shaped like x0."""
        a, b = self.coefficients(level)
        return a * x0 + b * eps

    def solve(self, z: Tensor, out: Tensor, level: Level) -> Denoised:
        """The pair (x0, eps) for which the network's output at z is `out`; the level is shaped like z."""
        a, b = self.coefficients(level)
        det = level.alpha * b - level.sigma * a
        return Denoised((b * z - level.sigma * out) / det, (level.alpha * out - a * z) / det)

    def solutions(self, level: Level) -> list[Solution]:
        """What `solve` does at each of some levels [T], as plain numbers: the factors of z and of the output."""
        a, b = self.coefficients(level)
        det = level.alpha * b - level.sigma * a
        of_z_and_out = (b / det, -level.sigma / det, -a / det, level.alpha / det)
        rows = zip(*(factor.tolist() for factor in of_z_and_out), strict=True)
        return [Solution((x0_z, x0_out), (eps_z, eps_out)) for x0_z, x0_out, eps_z, eps_out in rows]

    def input_scale(self, level: Level) -> Tensor:
        """What z is multiplied by before the network sees it, shaped like the level's alpha: 1, but for EDM."""
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
                f"(alpha = {float(schedule(torch.tensor(at)).alpha):g}): the network's output says nothing of "
                "x0 there. Use prediction=v, edm or flow, or a schedule that keeps some signal."
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
