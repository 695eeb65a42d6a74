"""UniPC (Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models")."""

from collections.abc import Sequence
from math import expm1
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.errors import UserError
from ldm.sampling.sampler import Noise, Point, Sampler, Steps, weighted_sum


class Estimate(NamedTuple):
    """The estimate of x0 at a point of the grid."""

    at: Point
    x0: Tensor


class UniPC(Sampler):
    """UniPC-p in half log-SNR, predicting data, B(h) = e^h - 1 ("B2"); one network call a step.

    The estimate at a predicted point corrects that point (UniC), which raises the order to p + 1, and predicts
    the next one (UniP). The first steps are of lower order, and so are the last ones where the grid ends at the
    data. A step from a level without signal, where log-SNR is infinite, is DDIM's and does not enter the history.
    """

    def __init__(self, order: int = 2) -> None:
        if not 1 <= order <= 3:
            raise UserError(f"order={order}: expected 1 to 3 (2 with guidance, 3 without)")
        self.order = order

    def __call__(self, denoise: Denoise, z: Tensor, steps: Steps, noise: Noise) -> Tensor:
        ends_at_data = steps.points[-1].sigma == 0
        history: list[Estimate] = []  # the newest first
        z_previous, order = z, 0  # z one step ago, and the order of the step from there
        for done, (now, then) in enumerate(steps):
            x0, eps = denoise(z, now.t)
            if now.alpha == 0:
                z = then.alpha * x0 + then.sigma * eps
                continue
            if order:
                z = advance(z_previous, now, [*history[:order], Estimate(now, x0)])  # UniC
            history = [Estimate(now, x0), *history][: self.order]
            order = min(len(history), len(steps) - done if ends_at_data else self.order)
            z_previous, z = z, advance(z, then, history[:order])  # UniP
        return z


def advance(z: Tensor, then: Point, estimates: Sequence[Estimate]) -> Tensor:
    """z, which lies at the first estimate's point, taken to `then`.

    z' = sigma'/sigma z + gain (x0 + sum_k rho_k (x0_k - x0) / r_k), where the k-th of the other estimates lies r_k
    steps away: in the past (UniP), or at `then` itself (UniC).
    """
    now, x0 = estimates[0]
    h = then.half_log_snr - now.half_log_snr
    ratios = [(other.at.half_log_snr - now.half_log_snr) / h for other in estimates[1:]]
    weights = [rho / r for rho, r in zip(rhos(ratios, h), ratios, strict=True)]
    gain = -then.alpha * expm1(-h)
    D = weighted_sum([1.0 - sum(weights), *weights], [x0, *(other.x0 for other in estimates[1:])])
    return then.sigma / now.sigma * z + gain * D


def rhos(ratios: Sequence[float], h: float) -> list[float]:
    """The weights of the differences at steps r_k h, of R rho = b / B(h) with B(h) = e^-h - 1.

    One difference has the weight 1/2, which is its limit and keeps the order.
    """
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    b, phi, factorial = [], expm1(-h) / -h - 1.0, 1.0  # phi_2(-h) (-h)
    for i in range(len(ratios)):
        b.append(phi * factorial / expm1(-h))
        factorial *= i + 2
        phi = phi / -h - 1.0 / factorial
    return solved(ratios, b)


def solved(r: Sequence[float], b: Sequence[float]) -> list[float]:
    """rho with sum_k rho_k r_k^i = b_i for i = 0, 1, ... (Bjorck and Pereyra 1970, for the primal system)."""
    rho, n = list(b), len(b)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            rho[i] -= r[k] * rho[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            rho[i] /= r[i] - r[i - k - 1]
        for i in range(k, n - 1):
            rho[i] -= rho[i + 1]
    return rho
