"""DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling")."""

from math import expm1

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule
from ldm.sampling.sampler import Noise, OnStep, Sampler, steps_of


class DPMPP2M(Sampler):
    """Algorithm 2: a second-order multistep solver in half log-SNR, one network call a step.

    The first step is of first order, and so is the last where the grid ends at the data (its log-SNR is
    infinite there).
    """

    def __call__(
        self,
        denoise: Denoise,
        z: Tensor,
        times: Tensor,
        schedule: Schedule,
        noise: Noise,
        on_step: OnStep = lambda done: None,
    ) -> Tensor:
        previous: Tensor | None = None  # x0 one step ago
        h_previous = 0.0
        for done, (now, then) in enumerate(steps_of(times, schedule, z), start=1):
            x0 = denoise(z, now.t).x0
            h = then.half_log_snr - now.half_log_snr
            z = z * (then.sigma / now.sigma)
            gain = -then.alpha * expm1(-h)
            if previous is None or then.sigma == 0:
                z.add_(x0, alpha=gain)
            else:
                r = h / (2 * h_previous)
                z.add_(x0, alpha=gain * (1 + r)).add_(previous, alpha=-gain * r)
            previous, h_previous = x0, h
            on_step(done)
        return z
