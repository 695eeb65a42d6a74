"""DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling")."""

from math import expm1

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule
from ldm.sampling.sampler import Noise, OnStep, Sampler, batch_time, steps_of


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
        for done, (t, t_next) in enumerate(steps_of(times), start=1):
            x0 = denoise(z, batch_time(t, z)).x0
            now, then = schedule(t), schedule(t_next)
            if float(then.sigma) == 0.0:
                z = float(then.alpha) * x0
            else:
                h = float(then.log_snr - now.log_snr) / 2  # the step in lambda = log(alpha / sigma)
                estimate = x0
                if previous is not None:
                    estimate = x0 + (h / (2 * h_previous)) * (x0 - previous)
                z = float(then.sigma / now.sigma) * z - float(then.alpha) * expm1(-h) * estimate
                previous, h_previous = x0, h
            on_step(done)
        return z
