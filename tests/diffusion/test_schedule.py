"""Levels, derivatives and the published figures of the noise schedules."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.config.build import build
from ldm.config.compose import CONFIGS
from ldm.diffusion.schedule import Discrete, Linear, ScaledLinear, Schedule
from ldm.errors import UserError

SCHEDULES = {path.stem: build(OmegaConf.load(path)) for path in sorted((CONFIGS / "schedule").glob("*.yaml"))}


def test_stable_diffusions_figures() -> None:
    schedule = ScaledLinear()
    assert schedule.alphas_cumprod[999] == pytest.approx(0.004660099, abs=5e-10)
    level = schedule(torch.tensor([0.0, 999.0]))
    ratio = level.sigma / level.alpha
    assert float(ratio[0]) == pytest.approx(0.029167, abs=5e-7)
    assert float(ratio[1]) == pytest.approx(14.614641, abs=5e-7)


def test_the_truly_linear_schedule_is_another() -> None:
    assert Linear(0.00085, 0.012).alphas_cumprod[999] == pytest.approx(0.001578963, abs=5e-10)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_derivatives_agree_with_finite_differences(schedule: Schedule) -> None:
    t = torch.linspace(schedule.t_min, schedule.t_max, 23, dtype=torch.float64)[1:-1] + 0.00217
    h = 1e-6
    before, at, after = schedule(t - h), schedule(t), schedule(t + h)
    torch.testing.assert_close(at.d_alpha, (after.alpha - before.alpha) / (2 * h), rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(at.d_sigma, (after.sigma - before.sigma) / (2 * h), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_log_snr_falls_and_inverts(schedule: Schedule) -> None:
    t = torch.linspace(schedule.t_min, schedule.t_max, 301, dtype=torch.float64)[1:-1]
    log_snr = schedule(t).log_snr
    assert bool((log_snr.diff() < 0).all())
    torch.testing.assert_close(schedule.time_of_log_snr(log_snr), t, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_clean_time_is_the_data_itself(schedule: Schedule) -> None:
    level = schedule(torch.tensor([schedule.t_clean]))
    assert (float(level.alpha), float(level.sigma)) == (1.0, 0.0)


def test_uniform_times_visit_every_step_equally() -> None:
    u = (torch.arange(4000) + 0.5) / 4000
    counts = torch.bincount(ScaledLinear().draw(u).long())
    assert counts.tolist() == [4] * 1000


def test_betas_outside_their_range_are_refused() -> None:
    with pytest.raises(UserError, match="inside"):
        Discrete(np.array([0.1, 1.0]))
