"""The loss in closed form: an exact denoiser's error, and weights that agree across parameterisations."""

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import X0, Epsilon, Prediction, V
from ldm.diffusion.schedule import ScaledLinear
from ldm.diffusion.time_density import LogitNormal, Uniform
from ldm.diffusion.weighting import MinSNR
from ldm.diffusion.weighting import Uniform as UniformWeight
from ldm.randomness import keys

STD = 0.5


class Exact(nn.Module):
    """The best possible network for data N(0, STD^2): E[a x0 + b eps | z]."""

    def __init__(self, prediction: Prediction) -> None:
        super().__init__()
        self.prediction, self.schedule = prediction, ScaledLinear()

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        level = self.schedule(t).like(z)
        variance = level.alpha**2 * STD**2 + level.sigma**2
        return self.prediction.target(level.alpha * STD**2 / variance * z, level.sigma / variance * z, level)


def test_an_exact_denoiser_meets_the_optimal_loss() -> None:
    schedule = ScaledLinear()
    loss = DiffusionLoss(UniformWeight(), Uniform())
    k = keys(0, "test", count=8000)
    x0 = STD * torch.randn(8000, 256, generator=torch.Generator().manual_seed(1))
    result = loss(Denoiser(Exact(Epsilon()), schedule, Epsilon()), x0, {}, k)
    level = schedule(result.t)
    optimal = level.alpha**2 * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)  # Var[eps | z]
    assert float(result.loss) == pytest.approx(float(optimal.mean()), rel=0.01)


@pytest.mark.parametrize("prediction", [X0(), V()], ids=lambda p: type(p).__name__)
def test_min_snr_weighs_the_same_error_alike_in_every_parameterisation(prediction: Prediction) -> None:
    schedule = ScaledLinear()
    t = torch.tensor([0.0, 10.0, 300.0, 700.0, 999.0])
    level = schedule(t)
    error = torch.randn(5, dtype=torch.float64)  # of x0; the error of eps is -alpha / sigma times it

    def weighted(p: Prediction) -> Tensor:
        out = p.target(error, -level.alpha / level.sigma * error, level)
        return MinSNR(5.0)(level, p) * out**2

    snr = level.log_snr.exp()
    torch.testing.assert_close(weighted(prediction), snr.clamp(max=5.0) * error**2)
    torch.testing.assert_close(weighted(Epsilon()), weighted(prediction))


def test_noise_and_times_belong_to_the_samples_key() -> None:
    loss = DiffusionLoss(UniformWeight(), Uniform(), offset_noise=0.1)
    denoiser = Denoiser(Exact(V()), ScaledLinear(), V())
    k, x0 = keys(3, count=6), torch.randn(6, 4, 8, 8)
    whole = loss(denoiser, x0, {}, k)
    part = loss(denoiser, x0[2:4], {}, k[2:4])
    assert torch.equal(whole.t[2:4], part.t)
    torch.testing.assert_close(whole.errors[2:4], part.errors)


def test_logit_normal_has_its_median_in_the_middle() -> None:
    t = LogitNormal()(torch.tensor([0.25, 0.5, 0.75]), ScaledLinear())
    assert t.tolist() == [336.0, 500.0, 663.0] or abs(float(t[1]) - 499.5) <= 0.5
    assert float(t[1] - t[0]) == pytest.approx(float(t[2] - t[1]), abs=1.0)
