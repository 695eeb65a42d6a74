"""Euler's method with noise added after each step (k-diffusion, `sample_euler_ancestral`)."""

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.errors import UserError
from ldm.sampling.sampler import Noise, Sampler, Steps, add_noise


class EulerAncestral(Sampler):
    """A step of Euler's in s = sigma / alpha to s_down, then noise of deviation s_up; s'^2 = s_down^2 + s_up^2.

    s_up = eta s' sqrt(1 - (s' / s)^2). In z this is DDIM with the same eta; eta = 1 is DDPM.
    """

    def __init__(self, eta: float = 1.0) -> None:
        if eta < 0:
            raise UserError(f"eta={eta}: expected 0 (Euler) or more")
        self.eta = eta

    def __call__(self, denoise: Denoise, z: Tensor, steps: Steps, noise: Noise) -> Tensor:
        for now, then in steps:
            x0, eps = denoise(z, now.t)
            s, s_next = now.ratio, then.ratio
            s_up = min(s_next, self.eta * s_next * (1.0 - (s_next / s) ** 2) ** 0.5)
            s_down = (s_next**2 - s_up**2) ** 0.5
            z = then.alpha * (x0 + s_down * eps)
            z = add_noise(z, then.alpha * s_up, noise)
        return z
