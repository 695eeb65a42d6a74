"""The loss in closed form: an exact denoiser's error, and weights that agree across parameterisations."""

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.conditioning.compose import Unconditional
from ldm.config.build import build
from ldm.config.compose import CONFIGS
from ldm.data.loading.batch import Batch
from ldm.diffusion.criterion import L1, L2, Criterion, Huber
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import DenoisingLoss, DiffusionLoss, NoiseKeys
from ldm.diffusion.prediction import X0, Epsilon, Prediction, V
from ldm.diffusion.schedule import Level, ScaledLinear, Schedule, VariancePreserving
from ldm.diffusion.time_density import Uniform
from ldm.diffusion.weighting import LearnedUncertainty, Weighting
from ldm.diffusion.weighting import Uniform as UniformWeight
from ldm.latent_diffusion import LatentDiffusion
from ldm.randomness import keys
from ldm.training.diffusion import DiffusionModule
from tests.networks.toy import ToyNetwork

STD = 0.5


def shipped(group: str) -> dict[str, Any]:
    return {path.stem: build(OmegaConf.load(path)) for path in sorted((CONFIGS / group).glob("*.yaml"))}


PREDICTIONS, WEIGHTINGS = shipped("prediction"), shipped("weighting")


class Exact(ToyNetwork):
    """The best possible network for data N(0, STD^2): E[a x0 + b eps | z]; `gain` 1 is exact."""

    def __init__(self, schedule: Schedule, prediction: Prediction, gain: float = 1.0) -> None:
        super().__init__()
        self.schedule, self.prediction = schedule, prediction
        self.gain = nn.Parameter(torch.tensor(gain))
        self.in_channels = self.out_channels = 3  # the pictures' of Passing
        self.context_dim = self.vector_dim = None

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        scale = (self.schedule.t_max + 1) / 1000 if isinstance(self.schedule, ScaledLinear) else 1 / 1000
        level = self.schedule(t.to(torch.float64) * scale).like(z)
        z = z / self.prediction.input_scale(level)
        x0 = self.gain * level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2) * z
        return self.prediction.target(x0, (z - level.alpha * x0) / level.sigma, level)


def draws(count: int, *address: int | str) -> NoiseKeys:
    return NoiseKeys(keys(*(address or (0, "test")), count=count), torch.arange(count), count)


def data(count: int, numbers: int) -> Tensor:
    return STD * torch.randn(count, 1, 1, numbers, generator=torch.Generator().manual_seed(1))


def loss_of(weighting: Weighting, criterion: Criterion | None = None, **knobs: Any) -> DiffusionLoss:
    return DiffusionLoss(weighting, Uniform(), criterion or L2(), **knobs)


# ------------------------------------------------------------------------------ the optimum, in closed form


def variance_of_x0(level: Level) -> Tensor:
    """Var[x0 | z] for data N(0, STD^2)."""
    return STD**2 * level.sigma**2 / (level.alpha**2 * STD**2 + level.sigma**2)


def snr(level: Level) -> Tensor:
    return level.log_snr.exp()


ON_X0: dict[str, Callable[[Level], Tensor]] = {  # the papers' weights of the squared error of x0
    "min_snr": lambda level: snr(level).clamp(max=5.0),
    "soft_min_snr": lambda level: 4.0 * snr(level) / (4.0 + snr(level)),
    "p2": lambda level: snr(level) / (1.0 + snr(level)),
    "edm": lambda level: (1.0 / snr(level) + 1.0) * snr(level),
    "learned_uncertainty": lambda level: (1.0 / snr(level) + 1.0) * snr(level),  # it begins as EDM's
}
OF_OUTPUT: dict[str, Callable[[Level], Tensor]] = {  # the squared error of the output over that of x0
    "epsilon": snr,
    "x0": lambda level: torch.ones_like(level.alpha),
    "v": lambda level: 1.0 / level.sigma**2,
    "flow": lambda level: (level.d_alpha / level.sigma**2) ** 2,
    "edm": lambda level: 1.0 / level.sigma**2,
}


class Passing(nn.Module):
    """A first stage whose latents are the pictures themselves."""

    factor, latent_channels = 1, 3

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return images


def trained_on(loss: DiffusionLoss, denoiser: Denoiser, n: int, side: int) -> Tensor:
    """The loss of DiffusionModule's training step on n pictures of the data."""
    model = LatentDiffusion(denoiser, Unconditional(), Passing())  # type: ignore[arg-type]
    module = DiffusionModule(model, loss, optimizer=torch.optim.SGD)  # type: ignore[arg-type]
    module.log_train = lambda values, batch_size: None  # type: ignore[method-assign,assignment]
    images = STD * torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))
    nowhere, at = torch.zeros(n, 2, dtype=torch.int64), torch.arange(n)
    return module.training_step(Batch(images, {}, at, keys(0, count=n), 0, nowhere, nowhere, at, n), 0)


def test_every_weighting_and_prediction_has_its_closed_form() -> None:
    assert set(ON_X0) | {"uniform"} == set(WEIGHTINGS)
    assert set(OF_OUTPUT) == set(PREDICTIONS)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_an_exact_denoiser_meets_the_optimal_loss_in_the_training_step(weighting: str, prediction: str) -> None:
    schedule, what = VariancePreserving(), PREDICTIONS[prediction]
    loss = loss_of(WEIGHTINGS[weighting])
    denoiser = Denoiser(Exact(schedule, what), schedule, what)
    found = trained_on(loss, denoiser, n=1000, side=8).detach()
    level = schedule(loss.times(denoiser, NoiseKeys(keys(0, count=1000), torch.arange(1000), 1000)))
    weight = OF_OUTPUT[prediction] if weighting == "uniform" else ON_X0[weighting]
    optimal = weight(level) * variance_of_x0(level)
    # each sample's error is a mean of 192 squares of normal numbers
    error = (optimal * sqrt(2 / 192)).square().sum().sqrt() / 1000
    assert float(found) == pytest.approx(float(optimal.mean()), abs=4 * float(error))


def test_the_optimal_absolute_error_is_that_of_a_normal_number() -> None:
    schedule = ScaledLinear()
    denoiser = Denoiser(Exact(schedule, Epsilon()), schedule, Epsilon())
    result = loss_of(UniformWeight(), L1())(denoiser, data(2000, 256), {}, draws(2000))
    level = schedule(result.t)
    optimal = sqrt(2 / pi) * (snr(level) * variance_of_x0(level)).sqrt()
    assert float(result.loss.detach()) == pytest.approx(float(optimal.mean()), rel=0.01)


@pytest.mark.parametrize("criterion", shipped("criterion").values(), ids=shipped("criterion"))
def test_a_criterion_is_least_where_there_is_no_difference(criterion: Criterion) -> None:
    d = torch.arange(-30, 31, dtype=torch.float64) / 10
    found = criterion(d)
    assert found.argmin() == 30 and float(found[30]) == 0.0
    torch.testing.assert_close(found, found.flip(0))
    assert bool((found[30:].diff() > 0).all())


def test_huber_is_the_square_and_then_its_tangent() -> None:
    found = Huber(0.5)(torch.tensor([0.3, -0.5, 2.0]))
    torch.testing.assert_close(found, torch.tensor([0.09, 0.25, 0.25 + 2 * 0.5 * 1.5]))


# ------------------------------------------------------------------------------------------------- weights


def gradient(weighting: Weighting, prediction: Prediction) -> Tensor:
    """The gradient of the loss by the one parameter that decides a network's x0, whatever it predicts."""
    schedule = ScaledLinear()
    network = Exact(schedule, prediction, gain=0.7)
    loss_of(weighting)(Denoiser(network, schedule, prediction), data(64, 16), {}, draws(64)).loss.backward()
    assert network.gain.grad is not None
    return network.gain.grad


@pytest.mark.parametrize("weighting", ON_X0)
def test_a_weight_on_the_data_is_its_papers(weighting: str) -> None:
    schedule = VariancePreserving()
    level = schedule(torch.linspace(schedule.t_min, schedule.t_max, 51, dtype=torch.float64))
    found = WEIGHTINGS[weighting].weights(level, X0())
    torch.testing.assert_close(found, ON_X0[weighting](level), rtol=1e-9, atol=0)


@pytest.mark.parametrize("weighting", ON_X0)
def test_a_weighting_gives_equal_gradients_in_every_parameterisation(weighting: str) -> None:
    found = torch.stack([gradient(WEIGHTINGS[weighting], prediction) for prediction in PREDICTIONS.values()])
    torch.testing.assert_close(found, found[:1].expand(len(found)), rtol=1e-3, atol=0)


def test_without_a_weighting_the_parameterisation_decides() -> None:
    assert abs(float(gradient(UniformWeight(), X0()))) < 0.1 * abs(float(gradient(UniformWeight(), V())))


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_weights_are_finite_at_every_time(weighting: Weighting) -> None:
    for schedule in shipped("schedule").values():
        t = torch.linspace(schedule.t_min, schedule.t_max, 101, dtype=torch.float64)
        weights = weighting.weights(schedule(t), V())
        assert bool(weights.isfinite().all()) and bool((weights >= 0).all()) and float(weights.detach().max()) > 0


def test_learned_uncertainty_learns_the_logarithm_of_the_loss() -> None:
    schedule, weighting = ScaledLinear(), LearnedUncertainty(UniformWeight()).double()
    level = schedule(torch.arange(0, 1000, 5))
    errors = snr(level) * variance_of_x0(level)
    optimizer = torch.optim.LBFGS(weighting.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = weighting(errors, level, Epsilon()).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    torch.testing.assert_close(weighting.log_variance(level), errors.log(), rtol=0, atol=0.03)
    torch.testing.assert_close(
        weighting.weights(level, Epsilon()) * errors, torch.ones(200, dtype=torch.float64), rtol=0.03, atol=0
    )


def test_what_a_weighting_learns_is_trained() -> None:
    schedule, weighting = VariancePreserving(), LearnedUncertainty(UniformWeight())
    model = LatentDiffusion(Denoiser(Exact(schedule, V()), schedule, V()), Unconditional(), Passing())  # type: ignore[arg-type]
    module = DiffusionModule(model, loss_of(weighting), lambda p: torch.optim.SGD(p, lr=0.1))
    optimized = module.configure_optimizers()["optimizer"].param_groups[0]["params"]
    assert any(p is weighting.factors for p in optimized)
    assert not any("factors" in name for name in module.trainable_parameters())  # it is no part of the model
    trained_on(module.loss, model.denoiser, n=8, side=2).backward()
    assert weighting.factors.grad is not None and float(weighting.factors.grad[0]) > 0


# --------------------------------------------------------------------------------------------------- noise


def test_noise_and_times_belong_to_the_samples_key() -> None:
    loss = loss_of(UniformWeight(), offset_noise=0.1, input_perturbation=0.1, stratified=True)
    denoiser = Denoiser(Exact(ScaledLinear(), V()), ScaledLinear(), V())
    all_of, x0 = draws(6, 3), torch.randn(6, 4, 8, 8)
    whole = loss(denoiser, x0, {}, all_of)
    part = loss(denoiser, x0[2:4], {}, NoiseKeys(all_of.rng_keys[2:4], all_of.positions[2:4], 6))
    assert torch.equal(whole.t[2:4], part.t)
    torch.testing.assert_close(whole.errors[2:4], part.errors)


class Zero(ToyNetwork):
    """A network that says nothing, and notes what it is given."""

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        self.seen = z
        return torch.zeros_like(z)


def noised(**knobs: float) -> tuple[Tensor, DenoisingLoss]:
    """The noise in the network's input over sigma, and the loss of saying nothing: the mean square of the target."""
    schedule = ScaledLinear()
    denoiser = Denoiser(Zero(), schedule, Epsilon())
    x0 = torch.zeros(500, 4, 8, 8)
    result = loss_of(UniformWeight(), **knobs)(denoiser, x0, {}, draws(500))
    return denoiser.network.seen / schedule(result.t).like(x0).sigma, result


def test_offset_noise_moves_whole_channels() -> None:
    plain, with_offset = noised()[0], noised(offset_noise=0.5)[0]
    offset = with_offset - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), rtol=0, atol=1e-4)
    assert float(offset[:, :, 0, 0].std()) == pytest.approx(0.5, rel=0.05)


def test_input_perturbation_is_in_the_input_and_not_in_the_target() -> None:
    (plain, before), (perturbed, after) = noised(), noised(input_perturbation=0.3)
    assert float((perturbed - plain).std()) == pytest.approx(0.3, rel=0.01)
    assert float(((perturbed - plain) * plain).mean()) == pytest.approx(0.0, abs=0.005)  # independent of eps
    torch.testing.assert_close(before.errors, after.errors)


@pytest.mark.parametrize(
    ("target", "knobs", "told"),
    [
        ("weighting.MinSNR", {"gamma": 0}, "gamma=0"),
        ("weighting.SoftMinSNR", {"gamma": -1}, "gamma=-1"),
        ("weighting.P2", {"k": 0}, "k=0"),
        ("weighting.EDM", {"sigma_data": 0}, "sigma_data=0"),
        ("prediction.EDM", {"sigma_data": 0}, "sigma_data=0"),
        ("criterion.Huber", {"delta": 0}, "delta=0"),
        ("time_density.LogitNormal", {"std": 0}, "std=0"),
        ("time_density.LogNormal", {"std": 0}, "std=0"),
    ],
)
def test_impossible_knobs_are_refused(target: str, knobs: dict[str, float], told: str) -> None:
    with pytest.raises(Exception, match=told):
        build(OmegaConf.create({"_target_": f"ldm.diffusion.{target}", **knobs}))


def test_negative_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="offset_noise=-1"):
        loss_of(UniformWeight(), offset_noise=-1)
