"""Heun's method on the probability-flow equation (Karras et al. 2022, algorithm 1)."""

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.sampler import Noise, OnStep, Sampler, Steps


class Heun(Sampler):
    """Second order in s = sigma / alpha, where y = z / alpha follows dy/ds = eps; two network calls a step.

    A step to the data, or from a level without signal (s is infinite there), is Euler's, with one call.
    """

    def __call__(
        self,
        denoise: Denoise,
        z: Tensor,
        steps: Steps,
        noise: Noise,
        on_step: OnStep = lambda done: None,
    ) -> Tensor:
        for done, (now, then) in enumerate(steps, start=1):
            estimate = denoise(z, now.t)
            z = estimate.mix(then.alpha, then.sigma)  # Euler
            if then.sigma > 0 and now.alpha > 0:
                half = then.alpha * (then.ratio - now.ratio) / 2
                denoise(z, then.t).add_to_(z, 0.0, half)
                estimate.add_to_(z, 0.0, -half)
            on_step(done)
        return z
