"""SDE-DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling")."""

from math import exp, expm1

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.errors import UserError
from ldm.sampling.dpmpp_2m import extrapolated
from ldm.sampling.sampler import Noise, Sampler, Steps, add_noise


class DPMPP2MSDE(Sampler):
    """A multistep solver in half log-SNR that draws fresh noise at every step, one network call a step.

    eta = 1 is the paper's stochastic equation, eta = 0 is DPM-Solver++(2M); between them as in k-diffusion's
    `sample_dpmpp_2m_sde`, midpoint.
    """

    def __init__(self, eta: float = 1.0) -> None:
        if eta < 0:
            raise UserError(f"eta={eta}: expected 0 (deterministic) or more (1 is the paper's)")
        self.eta = eta

    def __call__(self, denoise: Denoise, z: Tensor, steps: Steps, noise: Noise) -> Tensor:
        previous: tuple[Tensor, float] | None = None  # x0 and h of the last step
        for now, then in steps:
            x0, _ = denoise(z, now.t)
            h = then.half_log_snr - now.half_log_snr
            decay = self.eta * h if self.eta else 0.0  # h is infinite at the ends
            D = extrapolated(x0, h, previous) if then.sigma > 0 else x0
            z = then.sigma / now.sigma * exp(-decay) * z - then.alpha * expm1(-h - decay) * D
            z = add_noise(z, then.sigma * (-expm1(-2 * decay)) ** 0.5, noise)
            previous = x0, h
        return z
