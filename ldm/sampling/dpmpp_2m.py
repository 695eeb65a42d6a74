"""DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling")."""

from math import expm1

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.sampler import Noise, Sampler, Steps


class DPMPP2M(Sampler):
    """Algorithm 2: a second-order multistep solver in half log-SNR, one network call a step.

    The first step is of first order, and so is the last one where the grid ends at the data (its log-SNR is
    infinite there).
    """

    def __call__(self, denoise: Denoise, z: Tensor, steps: Steps, noise: Noise) -> Tensor:
        previous: tuple[Tensor, float] | None = None  # x0 and h of the last step
        for now, then in steps:
            x0, _ = denoise(z, now.t)
            h = then.half_log_snr - now.half_log_snr
            D = extrapolated(x0, h, previous) if then.sigma > 0 else x0
            z = then.sigma / now.sigma * z - then.alpha * expm1(-h) * D
            previous = x0, h
        return z


def extrapolated(x0: Tensor, h: float, previous: tuple[Tensor, float] | None) -> Tensor:
    """The paper's D: x0 in the middle of a step h in half log-SNR, on the line through the last two estimates."""
    if previous is None:
        return x0
    x0_previous, h_previous = previous
    return x0 + h / (2 * h_previous) * (x0 - x0_previous)
