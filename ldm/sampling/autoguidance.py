"""Autoguidance: away from a weaker version of the model itself (Karras et al. 2024)."""

from collections.abc import Callable

import torch
from torch import nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.sampling.guidance import Fields, Guidance, Inputs, Pair, Wrapping

Describe = Callable[[Fields, torch.device], Inputs]
"""Makes a model's own condition of texts, on a device."""


class Autoguidance(Wrapping):
    """Leads from a weaker model's estimate to the model's, both under the condition.

    Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself": less trained or smaller, it
    errs where the model errs, only more. It is a second network call, of its own size; the negative is not used.

    Args:
        guidance: says where to guide and how far.
        weaker: the weaker model's denoiser, with the latents and the schedule of the model; it is moved to its device.
        describe: its condition from the texts; None where it takes the model's own (a frozen encoder that they share).
        first_stage: the one it was trained on; None where it is known to be the model's.
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
        its, ours = self.weaker.schedule, denoiser.schedule
        if not _same_levels(its, ours):
            raise UserError(
                f"guidance.checkpoint: the weaker model has another noise schedule ({type(its).__name__}) than the "
                f"model ({type(ours).__name__}), so at one time each knows another noise level; give a model that "
                "was trained on the same one"
            )
        if self.first_stage is None or self._compared is first_stage:
            return
        if not _same_weights(self.first_stage, first_stage):
            raise UserError(
                "guidance.checkpoint: the weaker model was trained on the latents of another first stage; give an "
                "earlier checkpoint, or a smaller model, that was trained on this model's"
            )
        self._compared = first_stage

    def pair(self, denoiser: Denoiser, inputs: Inputs, negative: Inputs, fields: Fields | None) -> Pair:
        device = next(iter(inputs.values())).device
        theirs = dict(inputs)
        if self.describe is not None and fields is not None:
            theirs = {name: value for name, value in inputs.items() if name == "concat"}
            theirs |= self.describe(fields, device)
        weak, strong = self.weaker.to(device).bind(theirs), denoiser.bind(inputs)
        return lambda z, t: (weak(z, t), strong(z, t))


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
