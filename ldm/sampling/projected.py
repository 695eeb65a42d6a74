"""Adaptive projected guidance (Sadat et al. 2024)."""

from math import inf

import torch
from torch import Tensor

from ldm.diffusion.prediction import Denoised
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.sampling.guidance import ClassifierFree, Rule, feature_dims, from_x0


class Projected(ClassifierFree):
    """Guides by the part of the direction that is orthogonal to the conditional x0, against oversaturation.

    Sadat et al. 2024, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models" (APG).
    The direction, conditional minus unconditional x0, gets `momentum` times the previous one added and is cut to a
    norm of `norm_threshold`; of its part along the conditional x0 the fraction `eta` is kept. In this order, as in the
    paper's algorithm: x0 = cond + (scale - 1) (orthogonal + eta parallel). With eta 1, momentum 0 and no threshold it
    is classifier-free guidance.

    The paper has eta 0, a negative momentum (-0.5 for SDXL, -0.75 for others) and a threshold (15 for SDXL's
    128x128 latents). A norm grows with the root of a latent's size, so a threshold belongs to one model; and momentum
    assumes steps so short that directions hardly change. So both are off by default.
    """

    def __init__(self, eta: float = 0.0, norm_threshold: float = inf, momentum: float = 0.0) -> None:
        """`norm_threshold` is over all values of a latent; a negative momentum damps what stays the same."""
        super().__init__()
        if norm_threshold <= 0.0 or not -1.0 < momentum < 1.0:
            raise UserError(
                f"guidance.norm_threshold={norm_threshold}, guidance.momentum={momentum}: expected a threshold above 0 "
                "(inf: none) and a momentum inside (-1, 1)"
            )
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = momentum

    def rule(self, schedule: Schedule, scale: float) -> Rule:
        average: Tensor | None = None

        def projected(z: Tensor, t: Tensor, uncond: Denoised, cond: Denoised) -> Denoised:
            nonlocal average
            direction = cond.x0 - uncond.x0
            average = direction if average is None else direction + self.momentum * average
            direction = average * (self.norm_threshold / _norm(average)).clamp(max=1.0)
            unit = cond.x0 / _norm(cond.x0)
            parallel = (direction * unit).sum(feature_dims(direction), keepdim=True) * unit
            orthogonal = direction - parallel
            return from_x0(cond.x0 + (scale - 1.0) * (orthogonal + self.eta * parallel), z, t, schedule)

        return projected


def _norm(x: Tensor) -> Tensor:
    """The norm of each row of x [B, ...], above 0, shaped [B, 1, ...]."""
    return x.square().sum(feature_dims(x), keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
