"""Euler's method on the probability-flow equation (Karras et al. 2022, algorithm 1 without its correction)."""

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.sampler import Noise, Sampler, Steps


class Euler(Sampler):
    """First order in s = sigma / alpha, where y = z / alpha follows dy/ds = eps.

    y' = y + (s' - s) eps = x0 + s' eps, so z' = alpha' x0 + sigma' eps: DDIM at eta 0 is the same method (Song
    et al. 2020, eq. 14), and on the straight path so is Euler's method in t.
    """

    def __call__(self, denoise: Denoise, z: Tensor, steps: Steps, noise: Noise) -> Tensor:
        for now, then in steps:
            x0, eps = denoise(z, now.t)
            z = then.alpha * x0 + then.sigma * eps
        return z
