"""Every prediction type is one 2x2 system; singular ones are refused when they are built."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.config.build import build
from ldm.config.compose import CONFIGS
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import EDM, Epsilon, Flow, Prediction, V
from ldm.diffusion.schedule import RectifiedFlow, ScaledLinear, Schedule, VarianceExploding, ZeroTerminalSNR
from ldm.errors import UserError
from tests.networks.toy import ToyNetwork

PREDICTIONS = {path.stem: build(OmegaConf.load(path)) for path in sorted((CONFIGS / "prediction").glob("*.yaml"))}


class Silent(ToyNetwork):
    """A network whose output is its input."""

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return z


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


def test_edm_is_karras_preconditioning() -> None:
    """D = c_skip y + c_out F(c_in y), y = x0 + s eps, with the coefficients of table 1 (Karras et al. 2022)."""
    s, sigma_data = torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64), 0.5
    x0, eps = torch.randn(2, 4, dtype=torch.float64)
    level, edm = VarianceExploding()(s), EDM(sigma_data)
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
    y = x0 + s * eps
    out = edm.target(x0, eps, level)
    torch.testing.assert_close(c_skip * y + c_out * out, x0)
    torch.testing.assert_close(edm.input_scale(level), 1 / (s**2 + sigma_data**2).sqrt())
    torch.testing.assert_close(edm.solve(y, out, level).x0, x0)


def test_the_network_sees_edms_scaled_input() -> None:
    seen = []
    network = ToyNetwork()
    network.forward = lambda z, t: seen.append(z) or z  # type: ignore[method-assign,assignment,func-returns-value]
    denoiser = Denoiser(network, VarianceExploding(), EDM(1.0))
    z, t = torch.full((2, 1, 1, 1), 60.0), torch.tensor([30.0, 30.0], dtype=torch.float64)
    denoiser.bind({})(z, t)
    denoiser.bind({})(z, torch.tensor([30.0, 60.0], dtype=torch.float64))
    denoiser.output(z, t, denoiser.schedule(t).like(z), {})
    expected = [60 / 901**0.5, 60 / 901**0.5, 60 / 901**0.5, 60 / 3601**0.5, 60 / 901**0.5, 60 / 901**0.5]
    assert torch.cat(seen).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
def test_one_time_for_all_rows_is_solved_as_many_times_are(prediction: Prediction) -> None:
    """A row's estimate does not depend on the times of the others."""
    torch.manual_seed(0)
    network = ToyNetwork()
    network.forward = lambda z, t: (0.3 * z + t[:, None] / 1000).sin()  # type: ignore[method-assign,assignment]
    denoiser = Denoiser(network, ScaledLinear(), prediction)
    z = torch.randn(3, 5, dtype=torch.float64)
    t = torch.tensor([500.0, 500.0, 500.25], dtype=torch.float64)
    general, equal = denoiser.bind({})(z, t), denoiser.bind({})(z[:2], t[:2])
    torch.testing.assert_close(equal.x0, general.x0[:2])
    torch.testing.assert_close(equal.eps, general.eps[:2])


def test_epsilon_without_signal_is_refused_when_built() -> None:
    with pytest.raises(UserError, match="singular at t = 1"):
        Denoiser(Silent(), RectifiedFlow(), Epsilon())
    Denoiser(Silent(), RectifiedFlow(), V())
    with pytest.raises(UserError, match="singular at t = 999"):
        Denoiser(Silent(), ZeroTerminalSNR(ScaledLinear()), Epsilon())
    Denoiser(Silent(), ZeroTerminalSNR(ScaledLinear()), EDM())
