"""Guidance: takes a denoiser and its conditions, gives the `denoise` that a sampler sees."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.prediction import Denoised

Inputs = Mapping[str, Tensor]
"""A condition's tensors by name, each [B, ...]."""


class Guidance(ABC):
    """Binds a denoiser to a condition and to what it is guided away from."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, inputs: Inputs, negative: Inputs) -> Denoise:
        """The guided `denoise` for a batch; `inputs` and `negative` hold the same names, each [B, ...]."""


class ClassifierFree(Guidance):
    """eps = eps(negative) + scale (eps(condition) - eps(negative)) (Ho and Salimans 2022, eq. 6, w = scale - 1).

    Both halves are one network call; at scale 1 the unconditional half is not computed.
    """

    def __init__(self, scale: float = 7.5) -> None:
        self.scale = scale

    def __call__(self, denoiser: Denoiser, inputs: Inputs, negative: Inputs) -> Denoise:
        if self.scale == 1.0:
            return lambda z, t: denoiser(z, t, dict(inputs))
        both = {name: torch.cat([negative[name], inputs[name]]) for name in inputs}

        def denoise(z: Tensor, t: Tensor) -> Denoised:
            # x0 and eps are both linear in the network's output, so guiding each is guiding the output.
            halves = denoiser(torch.cat([z, z]), torch.cat([t, t]), both)
            x0_from, x0_to = halves.x0.chunk(2)
            eps_from, eps_to = halves.eps.chunk(2)
            return Denoised(x0_from.lerp(x0_to, self.scale), eps_from.lerp(eps_to, self.scale))

        return denoise
