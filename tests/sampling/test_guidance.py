"""Classifier-free guidance is exact in the output, makes one call, and none for the negative at scale 1."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.config.build import build
from ldm.config.compose import CONFIGS
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


@pytest.mark.parametrize("path", sorted((CONFIGS / "guidance").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_guidance_leads_away_from_the_negative(path: Path) -> None:
    """Between equal conditions it changes nothing; else it goes beyond the condition, by the scale."""
    denoiser = Denoiser(Counting(), ScaledLinear(), Epsilon())
    z, t = torch.randn(3, 4, 2, 2), torch.full((3,), 500.0)
    guided = lambda scale, given, away: (  # noqa: E731
        build(OmegaConf.merge(OmegaConf.load(path), {"scale": scale}))(
            denoiser, {"tokens": torch.full((3, 4), given)}, {"tokens": torch.full((3, 4), away)}
        )(z, t).eps
    )
    torch.testing.assert_close(guided(3.0, 2.0, 2.0), torch.full_like(z, 2.0))
    torch.testing.assert_close(guided(1.0, 2.0, 0.5), torch.full_like(z, 2.0))
    assert bool((guided(4.0, 2.0, 0.5) > guided(2.0, 2.0, 0.5)).all())
    assert bool((guided(2.0, 2.0, 0.5) > 2.0).all())
