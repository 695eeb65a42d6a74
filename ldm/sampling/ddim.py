"""DDIM (Song, Meng and Ermon 2020, "Denoising Diffusion Implicit Models")."""

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.errors import UserError
from ldm.sampling.sampler import Noise, Sampler, Steps, add_noise, posterior_deviation


class DDIM(Sampler):
    """Eq. 12: go to x0, then back to the next noise level; eta = 0 is deterministic, eta = 1 is DDPM."""

    def __init__(self, eta: float = 0.0) -> None:
        if eta < 0:
            raise UserError(f"eta={eta}: expected 0 (deterministic) or more (1 is DDPM)")
        self.eta = eta

    def __call__(self, denoise: Denoise, z: Tensor, steps: Steps, noise: Noise) -> Tensor:
        for now, then in steps:
            x0, eps = denoise(z, now.t)
            sigma_noise = self.eta * posterior_deviation(now, then)
            sigma_eps = max(then.sigma**2 - sigma_noise**2, 0.0) ** 0.5
            z = then.alpha * x0 + sigma_eps * eps
            z = add_noise(z, sigma_noise, noise)
        return z
