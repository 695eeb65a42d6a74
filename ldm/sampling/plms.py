"""PLMS, Stable Diffusion's default (Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds")."""

from collections import deque
from collections.abc import Iterable

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.sampler import Noise, OnStep, Point, Sampler, Steps

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

    def __call__(
        self,
        denoise: Denoise,
        z: Tensor,
        steps: Steps,
        noise: Noise,
        on_step: OnStep = lambda done: None,
    ) -> Tensor:
        history: deque[Tensor] = deque(maxlen=4)  # eps of the last steps, the newest first
        for done, (now, then) in enumerate(steps, start=1):
            estimate = denoise(z, now.t)
            if now.alpha == 0:  # z says nothing of x0, so eps is no slope for the next steps
                z = estimate.mix(then.alpha, then.sigma)
            else:
                history.appendleft(estimate.eps)
                if len(history) == 1 and then.sigma > 0:
                    ahead = denoise(estimate.mix(then.alpha, then.sigma), then.t).eps
                    z = transferred(z, now, then, [ahead, *history], (0.5, 0.5))
                else:
                    z = transferred(z, now, then, history, ADAMS_BASHFORTH[len(history) - 1])
            on_step(done)
        return z


def transferred(z: Tensor, now: Point, then: Point, slopes: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """DDIM's step from `now` to `then` with eps the weighted sum of `slopes`."""
    scale = then.alpha / now.alpha
    gain = then.sigma - now.sigma * scale
    z = z * scale
    for slope, weight in zip(slopes, weights, strict=True):
        z.add_(slope, alpha=gain * weight)
    return z
