"""Every shipped sampler against exact scores, in float64: its order, or the distribution that it ends with.

A wrong coefficient still makes pictures; here it changes the slope of an error or a variance in the 12th digit.
A sampler config without an entry in ORDERS or VARIANCES fails `test_no_sampler_escapes`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import exp, expm1
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.config.build import build
from ldm.config.compose import CONFIGS
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.prediction import Denoised
from ldm.diffusion.schedule import ScaledLinear, Schedule, VarianceExploding, VariancePreserving
from ldm.sampling.ddim import DDIM
from ldm.sampling.ddpm import DDPM
from ldm.sampling.grid import Grid, Karras, Leading, Trailing, UniformLogSNR
from ldm.sampling.sampler import Noise, Sampler, start, steps_of
from tests.sampling.mixture import COVARIANCE, MEAN, exact, flowed, level_at

SAMPLERS = sorted(path.stem for path in (CONFIGS / "sampler").glob("*.yaml"))
CONTINUOUS = VariancePreserving()

Times = Callable[[Schedule, int], Tensor]


def sampler_of(name: str, **knobs: Any) -> Sampler:
    """The sampler of a configuration, with other values for some knobs."""
    sampler = build(OmegaConf.merge(OmegaConf.load(CONFIGS / "sampler" / f"{name}.yaml"), knobs))  # type: ignore[arg-type]
    assert isinstance(sampler, Sampler)
    return sampler


def silent(shape: tuple[int, ...]) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


# ------------------------------------------------------------------------- deterministic samplers: their order


def uniform(schedule: Schedule, steps: int) -> Tensor:
    return torch.linspace(schedule.t_max, schedule.t_min, steps + 1, dtype=torch.float64)


def without_the_data(grid: Grid) -> Times:
    """The grid's times up to the least noisy one: the last step, to the data, is of first order by its nature."""
    return lambda schedule, steps: grid(schedule, steps + 1)[:-1]


class Order(NamedTuple):
    times: Times
    lowest: float
    highest: float
    error: float  # at 1280 steps, at most
    knobs: dict[str, Any] = {}  # noqa: RUF012


ORDERS = {
    "ddim": Order(uniform, 0.9, 1.1, 2e-3),
    "euler": Order(without_the_data(Karras()), 0.9, 1.1, 2.5e-3),
    "heun": Order(without_the_data(Karras()), 1.9, 2.1, 1e-5),
    "dpmpp_2m": Order(without_the_data(UniformLogSNR()), 1.9, 2.1, 6e-6),
    "plms": Order(uniform, 1.7, 2.4, 5e-6),
    "lms": Order(without_the_data(Karras()), 3.6, 4.2, 1e-8),
    # The corrector raises the order p of the predictor by one (Zhao et al. 2023).
    "unipc": Order(without_the_data(UniformLogSNR()), 2.85, 3.1, 4e-8),
    "unipc-1": Order(without_the_data(UniformLogSNR()), 1.9, 2.1, 1.5e-5, {"order": 1}),
    "unipc-3": Order(without_the_data(UniformLogSNR()), 3.85, 4.1, 6e-10, {"order": 3}),
    "lms-2": Order(without_the_data(Karras()), 1.9, 2.1, 2e-5, {"order": 2}),
    "lms-3": Order(without_the_data(Karras()), 2.85, 3.1, 4e-7, {"order": 3}),
    "dpmpp_2m_sde-0": Order(without_the_data(UniformLogSNR()), 1.9, 2.1, 6e-6, {"eta": 0.0}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_at_the_samplers_order(name: str) -> None:
    case = ORDERS[name]
    sampler = sampler_of(name.split("-")[0], **case.knobs)
    errors = []
    for steps in (320, 640, 1280):
        times = case.times(CONTINUOUS, steps)
        z, reference = flowed(CONTINUOUS, float(times[0]), float(times[-1]))
        end = sampler(exact(CONTINUOUS), z, steps_of(times, CONTINUOUS, len(z)), silent)
        errors.append(float((end - reference).abs().max()))
    slopes = -np.diff(np.log2(errors))
    assert case.lowest < slopes.min() and slopes.max() < case.highest, (slopes, errors)
    assert errors[-1] < case.error, errors


# ------------------------------------------------- stochastic samplers: the variance for Gaussian data, exactly

STD = 0.4
Step = tuple[float, float, float, float]  # (alpha, sigma) from, (alpha, sigma) to


def gaussian(schedule: Schedule, std: float) -> Denoise:
    """The exact denoiser of data N(0, std^2), a point where std is 0."""

    def denoise(z: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = level_at(schedule, float(t[0]))
        x0 = alpha * std**2 / (alpha**2 * std**2 + sigma**2) * z
        return Denoised(x0, (z - alpha * x0) / sigma)

    return denoise


def end_variance(sampler: Sampler, schedule: Schedule, times: Tensor, std: float) -> float:
    """The variance at the end, exactly: every sampler is linear in its start and in each of its draws.

    Row 0 starts at one deviation, row i has the i-th draw be 1; all else is 0. The squares add up.
    """
    alpha, sigma = level_at(schedule, float(times[0]))
    rows = len(times)
    z = torch.zeros(rows, 1, dtype=torch.float64)
    z[0] = (alpha**2 * std**2 + sigma**2) ** 0.5
    draws = iter(torch.eye(rows, dtype=torch.float64)[1:, :, None])
    end = sampler(gaussian(schedule, std), z, steps_of(times, schedule, len(z)), lambda shape: next(draws))
    return float(end.square().sum())


def posterior(step: Step, h_before: float) -> tuple[np.ndarray, float]:
    """DDPM's step for N(0, STD^2): mean of z' given z, and its variance. By Bayes' rule, with x0's estimate."""
    alpha, sigma, alpha_to, sigma_to = step
    keep = alpha / alpha_to
    noise = sigma**2 - keep**2 * sigma_to**2
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    mean = keep * sigma_to**2 / sigma**2 + alpha_to * noise / sigma**2 * gain
    return np.array([[mean, 0.0], [gain, 0.0]]), noise * sigma_to**2 / sigma**2


def multistep(step: Step, h_before: float) -> tuple[np.ndarray, float]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix B) on (z, x0 one step ago)."""
    alpha, sigma, alpha_to, sigma_to = step
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    if sigma_to == 0:
        return np.array([[alpha_to * gain, 0.0], [gain, 0.0]]), 0.0
    h = np.log(alpha_to / sigma_to) - np.log(alpha / sigma)
    scale = sigma_to / sigma * exp(-h)
    fresh = alpha_to * -expm1(-2 * h)
    slope = h / (2 * h_before) if h_before else 0.0
    mean = np.array([[scale + fresh * (1 + slope) * gain, -fresh * slope], [gain, 0.0]])
    return mean, sigma_to**2 * -expm1(-2 * h)


class Variance(NamedTuple):
    recursion: Callable[[Step, float], tuple[np.ndarray, float]]
    lowest: float  # slope of the variance's error over the steps
    highest: float
    error: float  # of the variance, at 320 steps, at most
    knobs: dict[str, Any] = {}  # noqa: RUF012


VARIANCES = {
    "ddpm": Variance(posterior, 0.9, 1.1, 6e-3),
    "euler_ancestral": Variance(posterior, 0.9, 1.1, 6e-3),
    "dpmpp_2m_sde": Variance(multistep, 1.9, 2.1, 6e-5),
    "ddim-1": Variance(posterior, 0.9, 1.1, 6e-3, {"eta": 1.0}),
}


def recursive_variance(case: Variance, schedule: Schedule, times: Tensor) -> float:
    """The variance at the end by the method's own recursion for the covariance of (z, x0 one step ago)."""
    levels = [level_at(schedule, float(t)) for t in times]
    state = np.diag([levels[0][0] ** 2 * STD**2 + levels[0][1] ** 2, 0.0])
    h_before = 0.0
    for now, then in pairwise(levels):
        mean, noise = case.recursion((*now, *then), h_before)
        state = mean @ state @ mean.T + np.diag([noise, 0.0])
        if then[1] > 0:
            h_before = float(np.log(then[0] / then[1]) - np.log(now[0] / now[1]))
    return float(state[0, 0])


@pytest.mark.parametrize("name", VARIANCES)
@pytest.mark.parametrize("grid", [Trailing(), Leading(), Karras()], ids=lambda g: type(g).__name__)
def test_the_variance_is_that_of_the_methods_recursion(name: str, grid: Grid) -> None:
    case, schedule = VARIANCES[name], ScaledLinear()
    times = grid(schedule, 50)
    found = end_variance(sampler_of(name.split("-")[0], **case.knobs), schedule, times, STD)
    assert found == pytest.approx(recursive_variance(case, schedule, times), rel=1e-11)


@pytest.mark.parametrize("name", VARIANCES)
def test_the_variance_converges_to_the_datas(name: str) -> None:
    case, errors = VARIANCES[name], []
    for steps in (80, 160, 320):
        times = without_the_data(UniformLogSNR())(CONTINUOUS, steps)
        alpha, sigma = level_at(CONTINUOUS, float(times[-1]))
        found = end_variance(sampler_of(name.split("-")[0], **case.knobs), CONTINUOUS, times, STD)
        errors.append(abs(found - (alpha**2 * STD**2 + sigma**2)))
    slopes = -np.diff(np.log2(errors))
    assert case.lowest < slopes.min() and slopes.max() < case.highest, (slopes, errors)
    assert errors[-1] < case.error, errors


@pytest.mark.parametrize("name", VARIANCES)
def test_samples_have_the_mixtures_moments(name: str) -> None:
    n, generator = 10_000, torch.Generator().manual_seed(0)

    def noise(shape: Sequence[int]) -> Tensor:
        return torch.randn(n, *shape, dtype=torch.float64, generator=generator)

    times = without_the_data(UniformLogSNR())(CONTINUOUS, 250)
    z = start(noise((2,)), times, CONTINUOUS)
    found = sampler_of(name.split("-")[0], **VARIANCES[name].knobs)(
        exact(CONTINUOUS), z, steps_of(times, CONTINUOUS, n), noise
    )
    torch.testing.assert_close(found.mean(0), MEAN, rtol=0, atol=0.03)  # three standard errors, or more
    torch.testing.assert_close(found.T.cov(), COVARIANCE, rtol=0.05, atol=0.015)


def test_no_sampler_escapes() -> None:
    """Every configuration has its order proved, or its distribution, with the knobs that it is shipped with."""
    proved = {name for name, case in {**ORDERS, **VARIANCES}.items() if not case.knobs}
    assert proved == set(SAMPLERS)


# --------------------------------------------------------------------------------------------- what is exact


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_a_point_of_data_leaves_the_noise_of_the_last_level(name: str, steps: int) -> None:
    """Where x0 is known, eps is the same all along: the variance at the end is 1 - alphas_cumprod there."""
    schedule = ScaledLinear()
    times = Leading()(schedule, steps)
    etas = [0.0, 0.3, 1.0] if "eta" in OmegaConf.load(CONFIGS / "sampler" / f"{name}.yaml") else [None]
    for eta in etas:
        sampler = sampler_of(name) if eta is None else sampler_of(name, eta=eta)
        found = end_variance(sampler, schedule, times, std=0.0)
        assert found == pytest.approx(1.0 - schedule.alphas_cumprod[0], rel=1e-11), eta


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_without_noise_samples_end_at_the_point_of_data(name: str, steps: int) -> None:
    """Where x0 is known and z is alpha x0, all that a sampler may do is to follow alpha."""
    schedule, x0 = ScaledLinear(), torch.tensor([[1.5, -0.7]], dtype=torch.float64)
    times = Leading()(schedule, steps)

    def denoise(z: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = level_at(schedule, float(t[0]))
        return Denoised(x0, (z - alpha * x0) / sigma)

    start = level_at(schedule, float(times[0]))[0] * x0
    end = sampler_of(name)(
        denoise, start, steps_of(times, schedule, 1), lambda shape: torch.zeros(1, *shape, dtype=torch.float64)
    )
    torch.testing.assert_close(end, schedule.alphas_cumprod[0] ** 0.5 * x0, rtol=1e-11, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
def test_plms_integrates_a_linear_slope_exactly_from_its_first_step(steps: int) -> None:
    """So do the improved Euler's step and the shorter formulas that it begins with, whose errors later ones drown."""
    schedule = VarianceExploding()
    times = torch.linspace(10.0, 1.0, steps + 1, dtype=torch.float64)

    def denoise(z: Tensor, t: Tensor) -> Denoised:
        eps = torch.full_like(z, 0.3 + 0.7 * float(t[0]))
        return Denoised(z - float(t[0]) * eps, eps)

    z = torch.tensor([[0.4]], dtype=torch.float64)
    end = sampler_of("plms")(denoise, z, steps_of(times, schedule, 1), silent)
    assert float(end) == pytest.approx(0.4 + 0.3 * (1.0 - 10.0) + 0.35 * (1.0 - 100.0), rel=1e-13)


def fixed_noise(rows: int) -> Noise:
    generator = torch.Generator().manual_seed(1)
    return lambda shape: torch.randn(rows, *shape, dtype=torch.float64, generator=generator)


def test_ddim_at_eta_1_is_ddpm_on_the_full_grid() -> None:
    schedule = ScaledLinear()
    times = Trailing()(schedule, 1000)
    z = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = DDIM(eta=1.0)(exact(schedule), z, steps_of(times, schedule, 4), fixed_noise(4))
    other = DDPM()(exact(schedule), z, steps_of(times, schedule, 4), fixed_noise(4))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("euler", {}), ("ddim", {})),
        (("euler_ancestral", {"eta": 0.6}), ("ddim", {"eta": 0.6})),
        (("dpmpp_2m_sde", {"eta": 0.0}), ("dpmpp_2m", {})),
        (("lms", {"order": 1}), ("euler", {})),
    ],
    ids=str,
)
def test_what_is_the_same_method_gives_the_same_samples(one: Any, other: Any) -> None:
    schedule = ScaledLinear()
    z = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = [
        sampler_of(name, **knobs)(exact(schedule), z, steps_of(Trailing()(schedule, 30), schedule, 4), fixed_noise(4))
        for name, knobs in (one, other)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
