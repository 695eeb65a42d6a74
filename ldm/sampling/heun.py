"""Heun's method on the probability-flow equation (Karras et al. 2022, algorithm 1)."""

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.sampler import Noise, Sampler, Steps


class Heun(Sampler):
    """Second order in s = sigma / alpha, where y = z / alpha follows dy/ds = eps; two network calls a step.

    A step to the data, or from a level without signal (s is infinite there), is Euler's, with one call.
    """

    def __call__(self, denoise: Denoise, z: Tensor, steps: Steps, noise: Noise) -> Tensor:
        for now, then in steps:
            x0, eps = denoise(z, now.t)
            z_next = then.alpha * x0 + then.sigma * eps  # Euler
            if then.sigma > 0 and now.alpha > 0:
                slope = (eps + denoise(z_next, then.t).eps) / 2
                z_next = then.alpha * (z / now.alpha + (then.ratio - now.ratio) * slope)
            z = z_next
        return z
