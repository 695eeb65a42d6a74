"""SDE-DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling")."""

from math import exp, expm1

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.prediction import Denoised
from ldm.errors import UserError
from ldm.sampling.sampler import Noise, OnStep, Sampler, Steps, add_noise_


class DPMPP2MSDE(Sampler):
    """A multistep solver in half log-SNR that draws fresh noise at every step, one network call a step.

    eta = 1 is the paper's stochastic equation, eta = 0 is DPM-Solver++(2M); between them as in k-diffusion's
    `sample_dpmpp_2m_sde`, midpoint.
    """

    def __init__(self, eta: float = 1.0) -> None:
        if eta < 0:
            raise UserError(f"eta={eta}: expected 0 (deterministic) or more (1 is the paper's)")
        self.eta = eta

    def __call__(
        self,
        denoise: Denoise,
        z: Tensor,
        steps: Steps,
        noise: Noise,
        on_step: OnStep = lambda done: None,
    ) -> Tensor:
        previous: Denoised | None = None  # one step ago
        h_previous = 0.0
        for done, (now, then) in enumerate(steps, start=1):
            estimate = denoise(z, now.t)
            h = then.half_log_snr - now.half_log_snr
            fading = self.eta * h if self.eta else 0.0  # h is infinite at the ends
            scale = then.sigma / now.sigma * exp(-fading)
            gain = -then.alpha * expm1(-h - fading)
            r = 0.0 if previous is None or then.sigma == 0 else h / (2 * h_previous)
            # scale z + gain ((1 + r) x0 - r x0 one step ago), where z is alpha x0 + sigma eps
            z = estimate.mix(scale * now.alpha + gain * (1 + r), scale * now.sigma)
            if previous is not None:
                previous.add_to_(z, -gain * r, 0.0)
            z = add_noise_(z, then.sigma * (-expm1(-2 * fading)) ** 0.5, noise)
            previous, h_previous = estimate, h
            on_step(done)
        return z
