"""Samplers against exact scores: every shipped sampler, with every grid that fits."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.config.build import build
from ldm.config.compose import CONFIGS
from ldm.diffusion.prediction import Denoised
from ldm.diffusion.schedule import ScaledLinear
from ldm.errors import UserError
from ldm.sampling.ddim import DDIM
from ldm.sampling.dpmpp_2m import DPMPP2M
from ldm.sampling.grid import Leading, Trailing, UniformLogSNR
from ldm.sampling.noise import ImageNoise

SCHEDULE = ScaledLinear()
MEAN, STD = 0.7, 0.4
SAMPLERS = sorted((CONFIGS / "sampler").glob("*.yaml"))
GRIDS = {path.stem: build(OmegaConf.load(path)) for path in sorted((CONFIGS / "grid").glob("*.yaml"))}


def exact(z: Tensor, t: Tensor) -> Denoised:
    """The exact denoiser of data N(MEAN, STD^2)."""
    level = SCHEDULE(t).like(z)
    variance = level.alpha**2 * STD**2 + level.sigma**2
    x0 = MEAN + level.alpha * STD**2 / variance * (z - level.alpha * MEAN)
    return Denoised(x0, (z - level.alpha * x0) / level.sigma)


def flowed(z: Tensor, t_from: float, t_to: float) -> Tensor:
    """The exact solution of the probability-flow equation: a Gaussian keeps its quantiles."""
    now, then = SCHEDULE(torch.tensor(t_from)), SCHEDULE(torch.tensor(t_to))
    deviation = lambda level: (level.alpha**2 * STD**2 + level.sigma**2).sqrt()  # noqa: E731
    return then.alpha * MEAN + deviation(then) / deviation(now) * (z - now.alpha * MEAN)


def order(sampler: object, times: object) -> float:
    """The slope of log error over N = 40, 80, 160 steps."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = []
    for steps in (40, 80, 160):
        grid = times(steps)[:-1]  # without the step to the data, where log-SNR is infinite
        end = sampler(exact, z, grid, SCHEDULE, ImageNoise([0] * 9))
        errors.append(float((end - flowed(z, float(grid[0]), float(grid[-1]))).abs().max()))
    slopes = torch.tensor(errors).log().diff() / torch.log(torch.tensor(0.5))
    return float(slopes.mean())


def test_ddim_is_of_first_order() -> None:
    assert 0.9 < order(DDIM(), lambda n: UniformLogSNR()(SCHEDULE, n)) < 1.1


def test_dpmpp_2m_is_of_second_order() -> None:
    assert 1.8 < order(DPMPP2M(), lambda n: UniformLogSNR()(SCHEDULE, n)) < 2.2


def test_ddim_at_eta_1_has_ddpms_variance() -> None:
    z = torch.randn(10_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end = DDIM(eta=1.0)(exact, z, Trailing()(SCHEDULE, 1000), SCHEDULE, ImageNoise(list(range(10_000))))
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(end.std()) == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("path", SAMPLERS, ids=lambda p: p.stem)
def test_every_shipped_sampler_finds_the_data(path: Path) -> None:
    sampler = build(OmegaConf.load(path))
    z = torch.randn(5_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    told: list[int] = []
    before = z.clone()
    end = sampler(exact, z, Trailing()(SCHEDULE, 100), SCHEDULE, ImageNoise(list(range(5_000))), told.append)
    assert torch.equal(z, before)
    assert told == list(range(1, 101))
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(end.std()) == pytest.approx(STD, rel=0.06)


def test_sds_grid_is_the_published_one() -> None:
    times = Leading()(SCHEDULE, 50)
    assert times[:3].tolist() == [981.0, 961.0, 941.0]
    assert times[-2:].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("steps", [1, 7, 50, 999, 1000])
def test_grids_fall_strictly(grid: object, steps: int) -> None:
    times = grid(SCHEDULE, steps)
    assert len(times) == steps + 1
    assert bool((times.diff() < 0).all())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("path", SAMPLERS, ids=lambda p: p.stem)
def test_every_sampler_goes_with_every_grid(path: Path, grid: object) -> None:
    z = torch.randn(2_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end = build(OmegaConf.load(path))(exact, z, grid(SCHEDULE, 50), SCHEDULE, ImageNoise(list(range(2_000))))
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(end.std()) == pytest.approx(STD, rel=0.15)


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=f"steps={steps}"):
        Trailing()(SCHEDULE, steps)


def test_an_images_noise_is_its_seeds_alone() -> None:
    many, one = ImageNoise([3, 4, 5, 6]), ImageNoise([5])
    for _ in range(3):
        assert torch.equal(many((4, 8, 8))[2], one((4, 8, 8))[0])
