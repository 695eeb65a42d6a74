"""Guidance whose estimate keeps the spread of the conditional one (Lin et al. 2023)."""

import torch
from torch import Tensor

from ldm.diffusion.prediction import Denoised
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.sampling.guidance import Guidance, Rule, Wrapping, features_of, of_x0


class Rescaled(Wrapping):
    """Scales the guided x0 to the conditional's standard deviation, against overexposure at large scales.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4: with s the
    deviation over all of an image's values, x0 <- factor x0 s(conditional) / s(guided) + (1 - factor) x0. It is
    done on x0, whatever the network predicts, so that one factor means the same for every prediction type.
    """

    def __init__(self, guidance: Guidance, factor: float = 0.7) -> None:
        """`factor` from 0 (nothing is changed) to 1 (the whole way); the paper's is 0.7."""
        super().__init__(guidance)
        if not 0.0 <= factor <= 1.0:
            raise UserError(f"guidance.factor={factor}: expected 0 (no rescaling) to 1 (all of it)")
        self.factor = factor

    def rule(self, schedule: Schedule) -> Rule:
        inner = self.guidance.rule(schedule)

        def rescaled(z: Tensor, t: Tensor, away: Denoised, to: Denoised) -> Denoised:
            x0 = inner(z, t, away, to).x0
            over, tiny = features_of(x0), torch.finfo(x0.dtype).tiny
            ratio = to.x0.std(over, keepdim=True) / x0.std(over, keepdim=True).clamp(min=tiny)
            return of_x0(x0 * (self.factor * ratio + (1.0 - self.factor)), z, t, schedule)

        return rescaled
