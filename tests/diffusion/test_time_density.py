"""Time densities by their quantiles, and strata that cover a global batch however it is shared out."""

from math import erf, exp, log, sqrt

import pytest
import torch
from omegaconf import OmegaConf

from ldm.config.build import build
from ldm.config.compose import CONFIGS
from ldm.diffusion.schedule import Discrete, RectifiedFlow, ScaledLinear, Schedule, VarianceExploding
from ldm.diffusion.time_density import LogitNormal, LogNormal, ResolutionShifted, TimeDensity, Uniform, stratified

DENSITIES = {path.stem: build(OmegaConf.load(path)) for path in sorted((CONFIGS / "time_density").glob("*.yaml"))}
SCHEDULES = {path.stem: build(OmegaConf.load(path)) for path in sorted((CONFIGS / "schedule").glob("*.yaml"))}


@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_times_rise_with_u_inside_the_schedule(density: TimeDensity, schedule: Schedule) -> None:
    t = density(torch.cat([torch.zeros(1), torch.linspace(0, 1 - 2**-24, 999)]), schedule)
    assert t.dtype == torch.float64
    assert bool((t.diff() >= 0).all()) and len(t.unique()) > 100
    assert float(t.min()) >= schedule.t_min and float(t.max()) <= schedule.t_max
    if isinstance(schedule, Discrete):
        assert torch.equal(t, t.round())


def test_logit_normal_has_its_quartiles() -> None:
    t = LogitNormal(mean=0.5, std=2.0)(torch.tensor([0.25, 0.5, 0.75]), RectifiedFlow())
    expected = [1 / (1 + exp(-(0.5 + 2.0 * q))) for q in (-0.674490, 0.0, 0.674490)]
    assert t.tolist() == pytest.approx(expected, abs=1e-6)
    assert LogitNormal()(torch.tensor([0.25, 0.5, 0.75]), ScaledLinear()).tolist() == [337.0, 500.0, 662.0]


def test_log_normal_is_edms() -> None:
    sigma = LogNormal()(torch.tensor([0.25, 0.5, 0.75]), VarianceExploding())
    assert sigma.log().tolist() == pytest.approx([-1.2 - 1.2 * 0.67449, -1.2, -1.2 + 1.2 * 0.67449], abs=1e-4)


def test_log_normal_is_cut_off_and_not_heaped_up_at_the_ends() -> None:
    schedule = VarianceExploding(0.3, 1.0)
    u = (torch.arange(10_000) + 0.5) / 10_000
    sigma = LogNormal(mean=-1.0, std=1.0)(u, schedule)
    cdf = lambda x: (1 + erf((log(x) + 1.0) / sqrt(2))) / 2  # noqa: E731
    share = (cdf(0.5) - cdf(0.3)) / (cdf(1.0) - cdf(0.3))
    assert float((sigma < 0.5).double().mean()) == pytest.approx(share, abs=2e-4)


def test_a_larger_picture_gets_more_noise() -> None:
    """sigma / alpha is multiplied by the ratio of the sides (Esser et al. 2024, eq. 23)."""
    flow, u = RectifiedFlow(), torch.tensor([0.1, 0.5, 0.9])
    plain = flow(Uniform()(u, flow))
    moved = flow(ResolutionShifted(Uniform(), pixels=1024**2, base_pixels=256**2)(u, flow))
    torch.testing.assert_close(moved.sigma / moved.alpha, 4.0 * plain.sigma / plain.alpha)
    with pytest.raises(ValueError, match="pixels=0"):
        ResolutionShifted(Uniform(), 0, 1)


@pytest.mark.parametrize("global_batch", [1, 2, 7, 64, 2048])
def test_every_position_has_a_stratum_of_its_own(global_batch: int) -> None:
    u = torch.rand(global_batch, generator=torch.Generator().manual_seed(0))
    found = stratified(u, torch.arange(global_batch), global_batch)
    assert (found * global_batch).floor().long().sort().values.tolist() == list(range(global_batch))
    torch.testing.assert_close((found * global_batch).frac().float(), u, rtol=0, atol=1e-6)


def test_each_rank_sees_all_of_the_density() -> None:
    """No rank's slice of a global batch is of high noise alone, or its loss would mean something else."""
    positions = torch.arange(2048).view(32, 64)
    for rank in positions:
        u = stratified(torch.full((64,), 0.5), rank, 2048).sort().values
        assert float(u.diff().max()) < 2.7 / 64
