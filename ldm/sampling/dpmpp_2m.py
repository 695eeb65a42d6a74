"""DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling")."""

from math import expm1

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.prediction import Denoised
from ldm.sampling.sampler import Noise, OnStep, Sampler, Steps


class DPMPP2M(Sampler):
    """Algorithm 2: a second-order multistep solver in half log-SNR, one network call a step.

    The first step is of first order, and so is the last where the grid ends at the data (its log-SNR is
    infinite there).
    """

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
            gain = -then.alpha * expm1(-h)
            r = 0.0 if previous is None or then.sigma == 0 else h / (2 * h_previous)
            # sigma'/sigma z + gain ((1 + r) x0 - r x0 one step ago), where z is alpha x0 + sigma eps
            z = estimate.mix(then.sigma / now.sigma * now.alpha + gain * (1 + r), then.sigma)
            if previous is not None:
                previous.add_to_(z, -gain * r, 0.0)
            previous, h_previous = estimate, h
            on_step(done)
        return z
