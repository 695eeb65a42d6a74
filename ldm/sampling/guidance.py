"""Guidance: takes a denoiser, a condition and an unconditional one, gives the `denoise` that a sampler sees.

A guidance has three parts: where it guides (`applies`), the two estimates (`pair`), and how it extrapolates from the
one to the other (`rule`). A wrapping guidance changes some of them and takes the others from the one it wraps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import Cond, Denoise, Denoiser
from ldm.diffusion.prediction import Denoised
from ldm.diffusion.schedule import Schedule, broadcast

Fields = Mapping[str, Sequence[str]]
"""The texts that the condition was made from, by name, each of B."""

Pair = Callable[[Tensor, Tensor], tuple[Denoised, Denoised]]
"""(z, t) -> (uncond, cond): the estimates that guidance extrapolates from and to."""

Rule = Callable[[Tensor, Tensor, Denoised, Denoised], Denoised]
"""(z, t, uncond, cond) -> the guided estimate; it may remember the previous calls of a run."""


class Guidance(ABC):
    """Binds a denoiser to a condition and an unconditional (or negative) one."""

    def __call__(
        self, denoiser: Denoiser, cond: Cond, uncond: Cond, scale: float, fields: Fields | None = None
    ) -> Denoise:
        """The guided `denoise` for one run of a batch, z [B, C, h, w] and t [B].

        Args:
            denoiser: the model.
            cond, uncond: the condition and the unconditional (or negative) one: the same names, each [B, ...].
            scale: guidance scale; 1 is the condition alone.
            fields: the texts of the condition, for a second model with its own text encoder.
        """
        schedule = denoiser.schedule
        pair, rule = self.pair(denoiser, cond, uncond, fields), self.rule(schedule, scale)
        unguided = denoiser.bind(cond)

        def denoise(z: Tensor, t: Tensor) -> Denoised:
            where = self.applies(schedule, t, scale)  # [B] bool
            if not where.any():
                return unguided(z, t)
            without, conditional = pair(z, t)
            guided = rule(z, t, without, conditional)
            if where.all():
                return guided
            rows = where.to(z.device).view(-1, *[1] * (z.ndim - 1))
            x0, eps = (torch.where(rows, *both) for both in zip(guided, conditional, strict=True))
            return Denoised(x0, eps)

        return denoise

    def check(self, denoiser: Denoiser, first_stage: nn.Module) -> None:
        """Raise UserError where it has a second model that does not fit this one and its first stage."""
        return

    @abstractmethod
    def applies(self, schedule: Schedule, t: Tensor, scale: float) -> Tensor:
        """Where it guides, bool [B] or [1], on the CPU; elsewhere only the condition is computed."""

    @abstractmethod
    def pair(self, denoiser: Denoiser, cond: Cond, uncond: Cond, fields: Fields | None) -> Pair:
        """The estimates that it extrapolates from and to."""

    @abstractmethod
    def rule(self, schedule: Schedule, scale: float) -> Rule:
        """How it extrapolates; a new rule for each run."""


class ClassifierFree(Guidance):
    """eps = eps(uncond) + scale (eps(cond) - eps(uncond)) (Ho and Salimans 2022, eq. 6, w = scale - 1).

    Both halves are one network call; at scale 1 the unconditional half is not computed.
    """

    def applies(self, schedule: Schedule, t: Tensor, scale: float) -> Tensor:
        return torch.tensor([scale != 1.0], device="cpu")

    def pair(self, denoiser: Denoiser, cond: Cond, uncond: Cond, fields: Fields | None) -> Pair:
        both = denoiser.bind({name: torch.cat([uncond[name], cond[name]]) for name in cond})

        def halves(z: Tensor, t: Tensor) -> tuple[Denoised, Denoised]:
            x0, eps = both(torch.cat([z, z]), torch.cat([t, t]))
            without, conditional = zip(x0.chunk(2), eps.chunk(2), strict=True)
            return Denoised(*without), Denoised(*conditional)

        return halves

    def rule(self, schedule: Schedule, scale: float) -> Rule:
        def guided(z: Tensor, t: Tensor, uncond: Denoised, cond: Denoised) -> Denoised:
            # x0 and eps are both linear in the network's output, so guiding the output is guiding each
            return Denoised(
                x0=uncond.x0 + scale * (cond.x0 - uncond.x0),
                eps=uncond.eps + scale * (cond.eps - uncond.eps),
            )

        return guided


class Wrapping(Guidance):
    """A guidance that changes another one; the parts that it does not define are the other's."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance

    def check(self, denoiser: Denoiser, first_stage: nn.Module) -> None:
        self.guidance.check(denoiser, first_stage)

    def applies(self, schedule: Schedule, t: Tensor, scale: float) -> Tensor:
        return self.guidance.applies(schedule, t, scale)

    def pair(self, denoiser: Denoiser, cond: Cond, uncond: Cond, fields: Fields | None) -> Pair:
        return self.guidance.pair(denoiser, cond, uncond, fields)

    def rule(self, schedule: Schedule, scale: float) -> Rule:
        return self.guidance.rule(schedule, scale)


def from_x0(x0: Tensor, z: Tensor, t: Tensor, schedule: Schedule) -> Denoised:
    """The estimate with this x0 and the eps that z = alpha x0 + sigma eps gives, shaped like z [B, ...]; t [B]."""
    level = schedule(t)
    return Denoised(x0, (z - broadcast(level.alpha, z) * x0) / broadcast(level.sigma, z))


def feature_dims(x: Tensor) -> tuple[int, ...]:
    """All dimensions of x [B, ...] except the batch's."""
    return tuple(range(1, x.ndim))
