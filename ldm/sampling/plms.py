"""PLMS, Stable Diffusion's default (Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds")."""

from collections import deque

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.sampler import Noise, Point, Sampler, Steps, weighted_sum

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""The weights of the last slopes, the newest first, for equal steps."""


class PLMS(Sampler):
    """The pseudo linear multistep method, PNDM without its Runge-Kutta steps (as CompVis' `plms.py`).

    eps of the last four steps is extrapolated as on equal steps, and DDIM's step, the paper's transfer part, is
    taken with it. The first step is the improved Euler's and makes one more network call.
    """

    def __call__(self, denoise: Denoise, z: Tensor, steps: Steps, noise: Noise) -> Tensor:
        history: deque[Tensor] = deque(maxlen=4)  # eps of the last steps, the newest first
        for now, then in steps:
            x0, eps = denoise(z, now.t)
            if now.alpha == 0:  # z does not depend on x0, so eps is not a slope for the next steps
                z = then.alpha * x0 + then.sigma * eps
                continue
            history.appendleft(eps)
            if len(history) == 1 and then.sigma > 0:  # the improved Euler method
                ahead = denoise(then.alpha * x0 + then.sigma * eps, then.t).eps
                eps = (eps + ahead) / 2
            else:
                eps = weighted_sum(ADAMS_BASHFORTH[len(history) - 1], history)
            z = transfer(z, eps, now, then)
        return z


def transfer(z: Tensor, eps: Tensor, now: Point, then: Point) -> Tensor:
    """DDIM's step from `now` to `then` with this eps (eq. 11)."""
    x0 = (z - now.sigma * eps) / now.alpha
    return then.alpha * x0 + then.sigma * eps
