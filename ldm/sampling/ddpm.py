"""DDPM's ancestral sampling (Ho, Jain and Abbeel 2020, "Denoising Diffusion Probabilistic Models")."""

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.sampler import Noise, OnStep, Sampler, Steps, add_noise_


class DDPM(Sampler):
    """Algorithm 2: draws from the posterior of the next z, given z and the estimate of x0.

    The variance is the posterior's own (eq. 7, "fixed small"). Between any two times, as in Kingma et al. 2021
    ("Variational Diffusion Models", appendix A), so that a grid may leave times out.
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
            alpha = now.alpha / then.alpha  # of z given the next z; its variance is sigma2
            sigma2 = now.sigma**2 - (alpha * then.sigma) ** 2
            of_z = alpha * then.sigma**2 / now.sigma**2
            of_x0 = then.alpha * sigma2 / now.sigma**2
            # of_z z + of_x0 x0, where z is now.alpha x0 + now.sigma eps
            mean = denoise(z, now.t).mix(of_x0 + of_z * now.alpha, of_z * now.sigma)
            z = add_noise_(mean, max(sigma2, 0.0) ** 0.5 * then.sigma / now.sigma, noise)
            on_step(done)
        return z
