"""Levels, derivatives and the published figures of the noise schedules."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.config.build import build
from ldm.config.compose import CONFIGS
from ldm.diffusion.schedule import (
    Cosine,
    Discrete,
    Linear,
    ScaledLinear,
    Schedule,
    VarianceExploding,
    VariancePreserving,
)
from ldm.errors import UserError

SCHEDULES = {path.stem: build(OmegaConf.load(path)) for path in sorted((CONFIGS / "schedule").glob("*.yaml"))}


def test_stable_diffusions_figures() -> None:
    schedule = ScaledLinear()
    assert schedule.alphas_cumprod[999] == pytest.approx(0.004660099, abs=5e-10)
    level = schedule(torch.tensor([0.0, 999.0]))
    ratio = level.sigma / level.alpha
    assert float(ratio[0]) == pytest.approx(0.029167, abs=5e-7)
    assert float(ratio[1]) == pytest.approx(14.614641, abs=5e-7)


def test_ldms_variants() -> None:
    """REFERENCE figures: betas' ends, as CompVis' configurations have them."""
    for name, end in (("sd", 0.012), ("ldm", 0.0195), ("ldm_churches", 0.0155)):
        alphas = SCHEDULES[name].alphas_cumprod
        first = 0.00085 if name == "sd" else 0.0015
        assert 1 - alphas[0] == pytest.approx(first, rel=1e-12)
        assert 1 - alphas[999] / alphas[998] == pytest.approx(end, rel=1e-12)
        assert len(SCHEDULES[name]) == 1000


def test_the_truly_linear_schedule_is_another() -> None:
    assert Linear(0.00085, 0.012).alphas_cumprod[999] == pytest.approx(0.001578963, abs=5e-10)
    level = Linear(0.00085, 0.012)(torch.tensor([999.0]))
    assert float(level.sigma / level.alpha) == pytest.approx(25.146, abs=5e-4)


def test_cosine_is_nichol_and_dhariwals() -> None:
    f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    t = np.arange(900)  # where no beta has been cut off
    np.testing.assert_allclose(Cosine().alphas_cumprod[:900], f(t + 1) / f(0), rtol=1e-9)
    assert 1 - Cosine().alphas_cumprod[999] / Cosine().alphas_cumprod[998] == pytest.approx(0.999)


@pytest.mark.parametrize("name", ["sd", "ldm", "ldm_churches", "linear", "cosine"])
def test_zero_terminal_snr_keeps_the_first_level_and_ends_without_signal(name: str) -> None:
    plain, rescaled = SCHEDULES[name], SCHEDULES[f"{name}_zero_terminal"]
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-12)
    assert rescaled.alphas_cumprod[-1] == 0.0
    level = rescaled(torch.tensor([0.0, 500.0, 999.0], dtype=torch.float64))
    assert float(level.alpha[2]) == 0.0 and float(level.sigma[2]) == 1.0
    torch.testing.assert_close(level.alpha.numpy() ** 2, rescaled.alphas_cumprod[[0, 500, 999]])
    ends = np.sqrt(plain.alphas_cumprod[[0, 999]])
    scaled = (np.sqrt(plain.alphas_cumprod[500]) - ends[1]) * ends[0] / (ends[0] - ends[1])
    assert float(level.alpha[1]) == pytest.approx(scaled, rel=1e-12)


def test_edms_levels_are_the_noise_itself() -> None:
    schedule = VarianceExploding()
    level = schedule(torch.tensor([0.002, 3.0, 80.0]))
    assert level.alpha.tolist() == [1.0, 1.0, 1.0] and level.sigma.tolist() == pytest.approx([0.002, 3.0, 80.0])
    assert schedule.network_time(torch.tensor([0.002, 0.4, 80.0])).tolist() == pytest.approx([0, 500, 1000], abs=0.01)
    assert schedule.draw(torch.tensor([0.0, 0.5])).tolist() == pytest.approx([0.002, 0.4])
    with pytest.raises(UserError, match="sigma_min=3"):
        VarianceExploding(3.0, 2.0)


def test_continuous_vp_is_the_integral_of_beta() -> None:
    schedule = VariancePreserving(0.1, 20.0)
    t = torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule(t).alpha, torch.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1))
    torch.testing.assert_close(schedule(t).sigma ** 2, 1 - schedule(t).alpha ** 2)
    with pytest.raises(UserError, match="beta_min=0"):
        VariancePreserving(0.0, 20.0)


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
