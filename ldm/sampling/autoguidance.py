"""Autoguidance: guides away from a weaker version of the same model (Karras et al. 2024)."""

from collections.abc import Callable

import torch
from torch import nn

from ldm.diffusion.denoiser import Cond, Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.sampling.guidance import Fields, Guidance, Pair, Wrapping

Describe = Callable[[Fields, torch.device], Cond]
"""Encodes texts to a model's condition, on a device."""


class Autoguidance(Wrapping):
    """Extrapolates from a weaker model's estimate to the model's, both under the condition.

    Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself": a model that is less trained or
    smaller makes the same errors, only larger. It is a second network call; the unconditional condition is not used.

    Args:
        guidance: where to guide and by which rule.
        weaker: the weaker model's denoiser, with the latents and the schedule of the model; it is moved to its device.
        describe: the weaker model's condition of texts; None where it takes the model's (a shared frozen encoder).
        first_stage: the one that the weaker model was trained on; None where it is known to be the model's.
    """

    def __init__(
        self,
        guidance: Guidance,
        weaker: Denoiser,
        describe: Describe | None = None,
        first_stage: nn.Module | None = None,
    ) -> None:
        super().__init__(guidance)
        self.weaker = weaker
        self.describe = describe
        self.first_stage = first_stage
        self._compared: nn.Module | None = None

    def check(self, denoiser: Denoiser, first_stage: nn.Module) -> None:
        super().check(denoiser, first_stage)
        theirs, ours = self.weaker.schedule, denoiser.schedule
        if not _same_levels(theirs, ours):
            raise UserError(
                f"guidance.checkpoint: the weaker model has another noise schedule ({type(theirs).__name__}) than the "
                f"model ({type(ours).__name__}), so the same time is another noise level; give a model that was "
                "trained on the same schedule"
            )
        if self.first_stage is None or self._compared is first_stage:
            return
        if not _same_weights(self.first_stage, first_stage):
            raise UserError(
                "guidance.checkpoint: the weaker model was trained on the latents of another first stage; give an "
                "earlier checkpoint, or a smaller model, that was trained on this model's"
            )
        self._compared = first_stage

    def pair(self, denoiser: Denoiser, cond: Cond, uncond: Cond, fields: Fields | None) -> Pair:
        device = next(iter(cond.values())).device
        weaker_cond = dict(cond)
        if self.describe is not None and fields is not None:
            weaker_cond = {name: value for name, value in cond.items() if name == "concat"}
            weaker_cond |= self.describe(fields, device)
        weaker, stronger = self.weaker.to(device).bind(weaker_cond), denoiser.bind(cond)
        return lambda z, t: (weaker(z, t), stronger(z, t))


def _same_levels(one: Schedule, other: Schedule) -> bool:
    """Whether two schedules have the same level at each time."""
    if (one.t_clean, one.t_min, one.t_max) != (other.t_clean, other.t_min, other.t_max):
        return False
    t = torch.linspace(one.t_min, one.t_max, 11, dtype=torch.float64)
    return all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(one(t)[:2], other(t)[:2], strict=True))


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same parameters and buffers, wherever they are."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)
