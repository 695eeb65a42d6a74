"""UniPC (Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models")."""

from collections.abc import Sequence
from math import expm1
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.errors import UserError
from ldm.sampling.sampler import Noise, OnStep, Point, Sampler, Steps


class Estimate(NamedTuple):
    """A point that has been visited, and the estimate of x0 there."""

    at: Point
    x0: Tensor


class UniPC(Sampler):
    """UniPC-p in half log-SNR, predicting data, B(h) = e^h - 1 ("B2"); one network call a step.

    The estimate at a predicted point corrects that point (UniC), which raises the order to p + 1, and predicts
    the next one (UniP). The first steps are of lower order, and the last ones too where the grid ends at the
    data. A step from a level without signal, where log-SNR is infinite, is DDIM's and begins anew.
    """

    def __init__(self, order: int = 2) -> None:
        if not 1 <= order <= 3:
            raise UserError(f"order={order}: expected 1 to 3 (2 with guidance, 3 without)")
        self.order = order

    def __call__(
        self,
        denoise: Denoise,
        z: Tensor,
        steps: Steps,
        noise: Noise,
        on_step: OnStep = lambda done: None,
    ) -> Tensor:
        to_the_data = steps[-1][1].sigma == 0
        history: list[Estimate] = []  # the newest first
        before, used = z, 0  # z one step ago, and the order of the step that was taken from there
        for done, (now, then) in enumerate(steps, start=1):
            estimate = denoise(z, now.t)
            x0 = estimate.x0
            if used:
                z = advanced(before, now, history[:used], x0)
            if now.alpha == 0:
                before, used, history = z, 0, []
                z = estimate.mix(then.alpha, then.sigma)
            else:
                history = [Estimate(now, x0), *history][: self.order]
                left = len(steps) - done + 1
                before, used = z, min(len(history), left if to_the_data else self.order)
                z = advanced(z, then, history[:used])
            on_step(done)
        return z


def advanced(z: Tensor, then: Point, history: Sequence[Estimate], x0: Tensor | None = None) -> Tensor:
    """z, which lies at history[0], taken to `then`: predicted, or corrected by `x0`, the estimate there.

    z' = sigma'/sigma z + gain (x0_0 + sum_k rho_k (x0_k - x0_0) / r_k), for predicted data.
    """
    now = history[0].at
    h = then.half_log_snr - now.half_log_snr
    ratios = [(past.at.half_log_snr - now.half_log_snr) / h for past in history[1:]]
    tensors = [past.x0 for past in history]
    if x0 is not None:
        ratios.append(1.0)
        tensors.append(x0)
    parts = [rho / r for rho, r in zip(rhos(ratios, h), ratios, strict=True)]
    gain = -then.alpha * expm1(-h)
    z = z * (then.sigma / now.sigma)
    for tensor, part in zip(tensors, [1.0 - sum(parts), *parts], strict=True):
        z.add_(tensor, alpha=gain * part)
    return z


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
