"""Guidance: takes a denoiser and its conditions, gives the `denoise` that a sampler sees.

A guidance says three things, and a wrapping one changes some of them and takes the others from the one it wraps:
where it guides (`applies`), between which two estimates (`pair`), and how it goes beyond them (`rule`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.prediction import Denoised
from ldm.diffusion.schedule import Schedule, broadcast

Inputs = Mapping[str, Tensor]
"""A condition's tensors by name, each [B, ...]."""

Fields = Mapping[str, Sequence[str]]
"""The texts that the condition was made from, by name, each of B."""

Pair = Callable[[Tensor, Tensor], tuple[Denoised, Denoised]]
"""(z, t) -> what guidance leads away from, and what it leads to."""

Rule = Callable[[Tensor, Tensor, Denoised, Denoised], Denoised]
"""(z, t, away, to) -> the guided estimate; it may remember the calls before, of one run."""


class Guidance(ABC):
    """Binds a denoiser to a condition and to what it is guided away from."""

    def __call__(self, denoiser: Denoiser, inputs: Inputs, negative: Inputs, fields: Fields | None = None) -> Denoise:
        """The guided `denoise` for one run of a batch, z [B, C, h, w] and t [B].

        Args:
            denoiser: the model.
            inputs, negative: the condition and what guidance leads away from; the same names, each [B, ...].
            fields: the texts of the condition, for a second model that reads them itself.
        """
        schedule = denoiser.schedule
        pair, rule = self.pair(denoiser, inputs, negative, fields), self.rule(schedule)
        unguided = denoiser.bind(inputs)

        def denoise(z: Tensor, t: Tensor) -> Denoised:
            where = self.applies(schedule, t)  # [B] bool
            if not where.any():
                return unguided(z, t)
            away, to = pair(z, t)
            guided = rule(z, t, away, to)
            if where.all():
                return guided
            rows = where.to(z.device).view(-1, *[1] * (z.ndim - 1))
            return Denoised(torch.where(rows, guided.x0, to.x0), torch.where(rows, guided.eps, to.eps))

        return denoise

    def check(self, denoiser: Denoiser, first_stage: nn.Module) -> None:
        """Raise UserError where it brings a model of its own that does not go with this one and its first stage."""
        return

    @abstractmethod
    def applies(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Where it guides, bool [B] or [1], on the CPU; elsewhere the condition alone is computed."""

    @abstractmethod
    def pair(self, denoiser: Denoiser, inputs: Inputs, negative: Inputs, fields: Fields | None) -> Pair:
        """The two estimates that it goes from and to."""

    @abstractmethod
    def rule(self, schedule: Schedule) -> Rule:
        """How it goes beyond them; a new one for each run."""


class ClassifierFree(Guidance):
    """eps = eps(negative) + scale (eps(condition) - eps(negative)) (Ho and Salimans 2022, eq. 6, w = scale - 1).

    Both halves are one network call; at scale 1 the unconditional half is not computed.
    """

    def __init__(self, scale: float = 7.5) -> None:
        self.scale = scale

    def applies(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.tensor([self.scale != 1.0], device="cpu")

    def pair(self, denoiser: Denoiser, inputs: Inputs, negative: Inputs, fields: Fields | None) -> Pair:
        both = denoiser.bind({name: torch.cat([negative[name], inputs[name]]) for name in inputs})

        def halves(z: Tensor, t: Tensor) -> tuple[Denoised, Denoised]:
            return both(torch.cat([z, z]), torch.cat([t, t])).halves()

        return halves

    def rule(self, schedule: Schedule) -> Rule:
        # x0 and eps are both linear in the network's output, so guiding the output is guiding each.
        return lambda z, t, away, to: away.lerp(to, self.scale)


class Wrapping(Guidance):
    """A guidance that changes another one; what it does not say itself is the other's."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance

    def check(self, denoiser: Denoiser, first_stage: nn.Module) -> None:
        self.guidance.check(denoiser, first_stage)

    def applies(self, schedule: Schedule, t: Tensor) -> Tensor:
        return self.guidance.applies(schedule, t)

    def pair(self, denoiser: Denoiser, inputs: Inputs, negative: Inputs, fields: Fields | None) -> Pair:
        return self.guidance.pair(denoiser, inputs, negative, fields)

    def rule(self, schedule: Schedule) -> Rule:
        return self.guidance.rule(schedule)


def of_x0(x0: Tensor, z: Tensor, t: Tensor, schedule: Schedule) -> Denoised:
    """The estimate with this x0 that z = alpha x0 + sigma eps leaves, all shaped like z [B, ...]; t [B]."""
    level = schedule(t)
    return Denoised(x0, (z - broadcast(level.alpha, z) * x0) / broadcast(level.sigma, z))


def features_of(x: Tensor) -> tuple[int, ...]:
    """All dimensions of x [B, ...] but the batch's."""
    return tuple(range(1, x.ndim))
