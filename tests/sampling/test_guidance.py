"""Classifier-free guidance is exact in the output, makes one call, and none for the negative at scale 1."""

import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Epsilon
from ldm.diffusion.schedule import ScaledLinear
from ldm.sampling.guidance import ClassifierFree


class Counting(nn.Module):
    """A network whose output is the condition, and which notes the batch sizes that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        self.batches.append(len(z))
        return tokens[:, :, None, None].expand_as(z)


def guided_eps(scale: float) -> tuple[Tensor, list[int]]:
    network = Counting()
    denoiser = Denoiser(network, ScaledLinear(), Epsilon())
    inputs, negative = {"tokens": torch.full((3, 4), 2.0)}, {"tokens": torch.full((3, 4), 0.5)}
    denoise = ClassifierFree(scale)(denoiser, inputs, negative)
    return denoise(torch.randn(3, 4, 2, 2), torch.full((3,), 500.0)).eps, network.batches


def test_guided_noise_is_extrapolated_from_the_negative() -> None:
    eps, batches = guided_eps(3.0)
    torch.testing.assert_close(eps, torch.full_like(eps, 0.5 + 3.0 * 1.5))
    assert batches == [6]


def test_scale_1_makes_no_unconditional_call() -> None:
    eps, batches = guided_eps(1.0)
    torch.testing.assert_close(eps, torch.full_like(eps, 2.0))
    assert batches == [3]
