"""Autoguidance: away from a weaker version of the model itself (Karras et al. 2024)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Denoised
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
    """

    def __init__(self, guidance: Guidance, weaker: Denoiser, describe: Describe | None = None) -> None:
        super().__init__(guidance)
        self.weaker = weaker
        self.describe = describe

    def pair(self, denoiser: Denoiser, inputs: Inputs, negative: Inputs, fields: Fields | None) -> Pair:
        condition = dict(inputs)
        device = next(iter(condition.values())).device
        weaker, theirs = self.weaker.to(device), condition
        if self.describe is not None and fields is not None:
            theirs = {name: value for name, value in condition.items() if name == "concat"}
            theirs |= self.describe(fields, device)

        def both(z: Tensor, t: Tensor) -> tuple[Denoised, Denoised]:
            return weaker(z, t, theirs), denoiser(z, t, condition)

        return both
