"""DDPM's ancestral sampling (Ho, Jain and Abbeel 2020, "Denoising Diffusion Probabilistic Models")."""

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.sampler import Noise, Sampler, Steps, add_noise


class DDPM(Sampler):
    """Algorithm 2: draws the next z from its posterior, given z and the estimate of x0.

    Mean and variance are eq. 7's ("fixed small"), between any two times as in Kingma et al. 2021 ("Variational
    Diffusion Models", appendix A), so that a grid may skip times.
    """

    def __call__(self, denoise: Denoise, z: Tensor, steps: Steps, noise: Noise) -> Tensor:
        for now, then in steps:
            x0, _ = denoise(z, now.t)
            alpha = now.alpha / then.alpha  # of z given the next z; its variance is sigma2
            sigma2 = now.sigma**2 - (alpha * then.sigma) ** 2
            mean = (alpha * then.sigma**2 * z + then.alpha * sigma2 * x0) / now.sigma**2
            z = add_noise(mean, max(sigma2, 0.0) ** 0.5 * then.sigma / now.sigma, noise)
        return z
