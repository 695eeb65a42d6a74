"""Guidance that keeps the spread of the conditional estimate (Lin et al. 2023)."""

import torch
from torch import Tensor

from ldm.diffusion.prediction import Denoised
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.sampling.guidance import Guidance, Rule, Wrapping, feature_dims, from_x0


class Rescaled(Wrapping):
    """Scales the guided x0 to the conditional's standard deviation, against overexposure at large scales.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4: with s the
    deviation over all of an image's values, x0 <- factor x0 s(cond) / s(guided) + (1 - factor) x0. It acts on x0,
    whatever the network predicts, so that one factor means the same for every prediction type.
    """

    def __init__(self, guidance: Guidance, factor: float = 0.7) -> None:
        """`factor` from 0 (no rescaling) to 1 (all of it); the paper's is 0.7."""
        super().__init__(guidance)
        if not 0.0 <= factor <= 1.0:
            raise UserError(f"guidance.factor={factor}: expected 0 (no rescaling) to 1 (all of it)")
        self.factor = factor

    def rule(self, schedule: Schedule, scale: float) -> Rule:
        guide = self.guidance.rule(schedule, scale)

        def rescaled(z: Tensor, t: Tensor, uncond: Denoised, cond: Denoised) -> Denoised:
            x0 = guide(z, t, uncond, cond).x0
            dims, tiny = feature_dims(x0), torch.finfo(x0.dtype).tiny
            ratio = cond.x0.std(dims, keepdim=True) / x0.std(dims, keepdim=True).clamp(min=tiny)
            return from_x0(x0 * (self.factor * ratio + (1.0 - self.factor)), z, t, schedule)

        return rescaled
