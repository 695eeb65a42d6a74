"""Guidance at some noise levels only (Kynkaanniemi et al. 2024)."""

from math import inf

from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.sampling.guidance import Guidance, Wrapping


class Interval(Wrapping):
    """Guides where sigma_low < sigma / alpha <= sigma_high; elsewhere only the condition is computed.

    Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
    Diffusion Models": guidance harms at high noise levels and does not help at low ones. The levels are
    sigma / alpha, the noise on data of unit alpha: 0.03 to 14.6 for Stable Diffusion's schedule.
    """

    def __init__(self, guidance: Guidance, sigma_low: float = 0.0, sigma_high: float = inf) -> None:
        super().__init__(guidance)
        if not 0.0 <= sigma_low < sigma_high:
            raise UserError(
                f"guidance.sigma_low={sigma_low}, guidance.sigma_high={sigma_high}: expected 0 <= low < high"
            )
        self.sigma_low = sigma_low
        self.sigma_high = sigma_high

    def applies(self, schedule: Schedule, t: Tensor, scale: float) -> Tensor:
        level = schedule(t.cpu())
        ratio = level.sigma / level.alpha
        return (ratio > self.sigma_low) & (ratio <= self.sigma_high) & self.guidance.applies(schedule, t, scale)
