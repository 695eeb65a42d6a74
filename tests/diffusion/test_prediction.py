"""Every prediction type is one 2x2 system; singular ones are refused when they are built."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.config.build import build
from ldm.config.compose import CONFIGS
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Epsilon, Flow, Prediction, V
from ldm.diffusion.schedule import RectifiedFlow, ScaledLinear, Schedule
from ldm.errors import UserError

PREDICTIONS = {path.stem: build(OmegaConf.load(path)) for path in sorted((CONFIGS / "prediction").glob("*.yaml"))}


@pytest.mark.parametrize("schedule", [ScaledLinear(), RectifiedFlow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
def test_solving_the_target_gives_the_pair_back(prediction: Prediction, schedule: Schedule) -> None:
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]) * schedule.t_max
    level = schedule(t).like(x0)
    z = level.alpha * x0 + level.sigma * eps
    solved = prediction.solve(z, prediction.target(x0, eps, level), level)
    torch.testing.assert_close(solved.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solved.eps, eps, rtol=1e-9, atol=1e-9)


def test_v_is_the_derivative_by_angle() -> None:
    angle = torch.linspace(0.1, 1.4, 7, dtype=torch.float64)
    x0, eps = torch.randn(2, 7, dtype=torch.float64)
    level = ScaledLinear()(torch.zeros(7))._replace(alpha=angle.cos(), sigma=angle.sin())
    z = lambda a: a.cos() * x0 + a.sin() * eps  # noqa: E731
    torch.testing.assert_close(V().target(x0, eps, level), (z(angle + 1e-6) - z(angle - 1e-6)) / 2e-6)


def test_flow_on_the_straight_path_is_noise_minus_data() -> None:
    x0, eps = torch.randn(2, 4, dtype=torch.float64)
    level = RectifiedFlow()(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    torch.testing.assert_close(Flow().target(x0, eps, level), eps - x0)


def test_epsilon_without_signal_is_refused_when_built() -> None:
    with pytest.raises(UserError, match="singular at t = 1"):
        Denoiser(nn.Identity(), RectifiedFlow(), Epsilon())
    Denoiser(nn.Identity(), RectifiedFlow(), V())
