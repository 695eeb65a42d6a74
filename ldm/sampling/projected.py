"""Adaptive projected guidance (Sadat et al. 2024)."""

from math import inf

import torch
from torch import Tensor

from ldm.diffusion.prediction import Denoised
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.sampling.guidance import ClassifierFree, Rule, features_of, of_x0


class Projected(ClassifierFree):
    """Guides by the part of the direction that is orthogonal to the conditional x0, against oversaturation.

    Sadat et al. 2024, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models" (APG).
    The direction, conditional minus negative x0, gathers `momentum` times the one before, is cut to a norm of
    `norm_threshold`, and of its part along the conditional x0 the share `eta` is kept, in this order, as in the
    paper's algorithm: x0 = conditional + (scale - 1) (orthogonal + eta parallel). With eta 1, momentum 0 and no
    threshold it is classifier-free guidance.

    The paper has eta 0, a negative momentum (-0.5 for SDXL, -0.75 for others) and a threshold (15 for SDXL's
    128x128 latents). A norm grows with the root of a latent's size, so a threshold is of one model; and a momentum
    supposes steps so short that directions hardly change, or it adds the last step's error to this one's. So here
    neither is on unless it is asked for.
    """

    def __init__(
        self,
        scale: float = 7.5,
        eta: float = 0.0,
        norm_threshold: float = inf,
        momentum: float = 0.0,
    ) -> None:
        """`norm_threshold` is of all values of a latent together; a negative momentum damps what stays the same."""
        super().__init__(scale)
        if norm_threshold <= 0.0 or not -1.0 < momentum < 1.0:
            raise UserError(
                f"guidance.norm_threshold={norm_threshold}, guidance.momentum={momentum}: expected a threshold above 0 "
                "(inf: none) and a momentum inside (-1, 1)"
            )
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = momentum

    def rule(self, schedule: Schedule) -> Rule:
        average: Tensor | None = None

        def projected(z: Tensor, t: Tensor, away: Denoised, to: Denoised) -> Denoised:
            nonlocal average
            direction = to.x0 - away.x0
            if average is not None:
                direction = direction + self.momentum * average
            average = direction
            over = features_of(direction)
            direction = direction * (self.norm_threshold / _norm(direction)).clamp(max=1.0)
            unit = to.x0 / _norm(to.x0)
            parallel = (direction * unit).sum(over, keepdim=True) * unit
            kept = torch.lerp(direction - parallel, direction, self.eta)
            return of_x0(to.x0 + (self.scale - 1.0) * kept, z, t, schedule)

        return projected


def _norm(x: Tensor) -> Tensor:
    """The norm of each row of x [B, ...], above 0, shaped [B, 1, ...]."""
    return x.square().sum(features_of(x), keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
