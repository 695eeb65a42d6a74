"""The denoising loss: draw a time and noise for each sample, compare the network's output with its target."""

from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.time_density import TimeDensity
from ldm.diffusion.weighting import Weighting
from ldm.randomness import fold, normal, uniform


class DenoisingLoss(NamedTuple):
    """The weighted loss (a scalar) and, per sample [B], the unweighted error and the time it was drawn at."""

    loss: Tensor
    errors: Tensor
    t: Tensor


class DiffusionLoss:
    """Weighted mean squared error of the network's output (Ho et al. 2020, eq. 14, generalised).

    Args:
        weighting: weight of each noise level.
        time_density: how often each noise level is drawn.
        offset_noise: strength of noise that is constant over a channel (0 is off; SDXL used 0.05), which
            lets the mean brightness be learned (Guttenberg 2023).
    """

    def __init__(self, weighting: Weighting, time_density: TimeDensity, offset_noise: float = 0.0) -> None:
        self.weighting = weighting
        self.time_density = time_density
        self.offset_noise = offset_noise

    def __call__(self, denoiser: Denoiser, x0: Tensor, inputs: dict[str, Tensor], keys: Tensor) -> DenoisingLoss:
        """The loss at x0 [B, C, h, w]; each sample's time and noise come from its key in keys [B]."""
        t = self.time_density(uniform(fold(keys, "time")), denoiser.schedule)
        eps = normal(fold(keys, "noise"), tuple(x0.shape[1:])).to(x0.dtype)
        if self.offset_noise:
            eps = eps + self.offset_noise * normal(fold(keys, "offset"), (x0.shape[1], 1, 1)).to(x0.dtype)

        level = denoiser.schedule(t)
        shaped = level.like(x0)
        z = shaped.alpha * x0 + shaped.sigma * eps
        target = denoiser.prediction.target(x0, eps, shaped)
        errors = (denoiser.output(z, t, inputs) - target.float()).square().flatten(1).mean(1)
        weights = self.weighting(level, denoiser.prediction).to(errors.dtype)
        return DenoisingLoss((weights * errors).mean(), errors.detach(), t)
