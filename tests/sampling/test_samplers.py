"""What every shipped sampler and grid have in common; their orders are in test_convergence.py."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.config.build import build
from ldm.config.compose import CONFIGS
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.prediction import Denoised, Prediction
from ldm.diffusion.schedule import (
    Discrete,
    RectifiedFlow,
    ScaledLinear,
    Schedule,
    VariancePreserving,
    ZeroTerminalSNR,
)
from ldm.errors import UserError
from ldm.sampling.grid import Grid, Karras, Leading, Linspace, Shifted, Trailing, UniformLogSNR
from ldm.sampling.noise import ImageNoise
from ldm.sampling.sampler import start, steps_of
from tests.networks.toy import ToyNetwork

SCHEDULE = ScaledLinear()
MEAN, STD = 0.7, 0.4
SAMPLERS = sorted((CONFIGS / "sampler").glob("*.yaml"))
SCHEDULES = {path.stem: build(OmegaConf.load(path)) for path in sorted((CONFIGS / "schedule").glob("*.yaml"))}
PREDICTIONS = {path.stem: build(OmegaConf.load(path)) for path in sorted((CONFIGS / "prediction").glob("*.yaml"))}
GRIDS = {path.stem: build(OmegaConf.load(path)) for path in sorted((CONFIGS / "grid").glob("*.yaml"))}


def exact(schedule: Schedule) -> Denoise:
    """The exact denoiser of data N(MEAN, STD^2)."""

    def denoise(z: Tensor, t: Tensor) -> Denoised:
        level = schedule(t[:1]).like(z)
        variance = level.alpha**2 * STD**2 + level.sigma**2
        x0 = MEAN + level.alpha * STD**2 / variance * (z - level.alpha * MEAN)
        return Denoised(x0, (z - level.alpha * x0) / level.sigma)

    return denoise


def unit_noise(n: int) -> Tensor:
    return torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("path", SAMPLERS, ids=lambda p: p.stem)
def test_every_shipped_sampler_finds_the_data(path: Path) -> None:
    z, told = unit_noise(5_000), list[int]()
    before = z.clone()
    noise, times = ImageNoise(list(range(5_000))), Trailing()(SCHEDULE, 100)
    end = build(OmegaConf.load(path))(exact(SCHEDULE), z, steps_of(times, SCHEDULE, len(z), told.append), noise)
    assert torch.equal(z, before)
    assert told == list(range(1, 101))
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(end.std()) == pytest.approx(STD, rel=0.1)


@pytest.mark.parametrize("path", SAMPLERS, ids=lambda p: p.stem)
def test_a_step_is_reported_when_it_is_done(path: Path) -> None:
    events: list[int] = []  # 0: a network call

    def denoise(z: Tensor, t: Tensor) -> Denoised:
        events.append(0)
        return exact(SCHEDULE)(z, t)

    steps = steps_of(Trailing()(SCHEDULE, 3), SCHEDULE, 4, events.append)
    build(OmegaConf.load(path))(denoise, unit_noise(4), steps, ImageNoise(list(range(4))))
    assert events[0] == 0 and [event for event in events if event] == [1, 2, 3] and events[-1] == 3
    assert all(events[i - 1] == 0 for i, event in enumerate(events) if event)


@pytest.mark.parametrize("schedule", [ZeroTerminalSNR(ScaledLinear()), RectifiedFlow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("path", SAMPLERS, ids=lambda p: p.stem)
def test_every_sampler_can_begin_without_any_signal(path: Path, schedule: Schedule) -> None:
    """At alpha = 0 sigma / alpha and log-SNR are infinite."""
    times = Trailing()(schedule, 100)
    z = start(unit_noise(500), times, schedule)
    end = build(OmegaConf.load(path))(
        exact(schedule), z, steps_of(times, schedule, len(z)), ImageNoise(list(range(500)))
    )
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.08)
    assert float(end.std()) == pytest.approx(STD, rel=0.2)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("path", SAMPLERS, ids=lambda p: p.stem)
def test_every_sampler_goes_with_every_grid(path: Path, grid: Grid) -> None:
    noise = ImageNoise(list(range(500)))
    end = build(OmegaConf.load(path))(
        exact(SCHEDULE), unit_noise(500), steps_of(grid(SCHEDULE, 100), SCHEDULE, 500), noise
    )
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.08)
    assert float(end.std()) == pytest.approx(STD, rel=0.25)


class ExactNetwork(ToyNetwork):
    """What the best network of a prediction type puts out for the data N(MEAN, STD^2)."""

    def __init__(self, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        self.schedule, self.prediction = schedule, prediction

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        if isinstance(self.schedule, Discrete):
            level = self.schedule(t.to(torch.float64) * len(self.schedule) / 1000).like(z)
        else:
            level = self.schedule(t.to(torch.float64) / 1000).like(z)
        unscaled = z / self.prediction.input_scale(level)
        variance = level.alpha**2 * STD**2 + level.sigma**2
        x0 = MEAN + level.alpha * STD**2 / variance * (unscaled - level.alpha * MEAN)
        return self.prediction.target(x0, (unscaled - level.alpha * x0) / level.sigma, level)


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
@pytest.mark.parametrize("path", SAMPLERS, ids=lambda p: p.stem)
def test_samples_do_not_depend_on_what_the_network_predicts(path: Path, prediction: Prediction) -> None:
    schedule = VariancePreserving()
    sampler, times = build(OmegaConf.load(path)), Trailing()(schedule, 10)
    denoiser = Denoiser(ExactNetwork(schedule, prediction), schedule, prediction)
    z = start(unit_noise(8), times, schedule)
    one = sampler(denoiser.bind({}), z, steps_of(times, schedule, len(z)), ImageNoise(list(range(8))))
    other = sampler(exact(schedule), z, steps_of(times, schedule, len(z)), ImageNoise(list(range(8))))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # the network's time is in float32


def test_sds_grid_is_the_published_one() -> None:
    times = Leading()(SCHEDULE, 50)
    assert times[:3].tolist() == [981.0, 961.0, 941.0]
    assert times[-2:].tolist() == [1.0, 0.0]


def test_karras_grid_is_the_published_formula() -> None:
    schedule = SCHEDULES["edm"]
    times = Karras(rho=7.0)(schedule, 18)
    i = torch.arange(18, dtype=torch.float64)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # Karras et al. 2022, eq. 5
    torch.testing.assert_close(times[:-1], sigma)
    assert float(times[-1]) == 0.0
    between = schedule(Karras(7.0, sigma_min=0.1, sigma_max=10.0)(schedule, 5)).sigma
    assert between[[0, -2]].tolist() == pytest.approx([10.0, 0.1])


def test_equal_steps_are_equal() -> None:
    """In time from the last to the first (linspace), and in log-SNR."""
    assert Linspace()(SCHEDULE, 4).tolist() == [999.0, 666.0, 333.0, 0.0, -1.0]
    steps = SCHEDULE(UniformLogSNR()(SCHEDULE, 20)[:-1]).log_snr.diff()
    torch.testing.assert_close(steps, steps[:1].expand(19))


def test_shifting_multiplies_the_ratio_of_noise_to_signal_in_rectified_flow() -> None:
    flow = RectifiedFlow()
    plain, moved = flow(Trailing()(flow, 10)[1:-1]), flow(Shifted(Trailing(), 3.0)(flow, 10)[1:-1])
    torch.testing.assert_close(moved.sigma / moved.alpha, 3.0 * plain.sigma / plain.alpha)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_grids_fall_strictly(grid: Grid, schedule: Schedule) -> None:
    if isinstance(grid, Leading) and not isinstance(schedule, Discrete):
        with pytest.raises(UserError, match="needs a discrete schedule"):
            grid(schedule, 10)
        return
    for steps in (1, 7, 50, 999, 1000):
        times = grid(schedule, steps)
        assert len(times) == steps + 1
        assert bool((times.diff() < 0).all())
        assert float(times[0]) <= schedule.t_max
        level = schedule(times)
        assert bool((level.sigma.diff() < 0).all()) and bool(level.alpha.isfinite().all())


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=f"steps={steps}"):
        Trailing()(SCHEDULE, steps)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("ldm.sampling.ddim.DDIM eta", "eta=-1"),
        ("ldm.sampling.euler_ancestral.EulerAncestral eta", "eta=-1"),
        ("ldm.sampling.dpmpp_2m_sde.DPMPP2MSDE eta", "eta=-1"),
        ("ldm.sampling.lms.LMS order", "order=-1: expected 1 to 4"),
        ("ldm.sampling.unipc.UniPC order", "order=-1: expected 1 to 3"),
        ("ldm.sampling.grid.Karras rho", "rho=-1"),
        ("ldm.sampling.grid.Karras sigma_min", "sigma_min=-1"),
    ],
)
def test_impossible_knobs_are_refused(given: str, told: str) -> None:
    target, knob = given.split()
    with pytest.raises(Exception, match=told):
        build(OmegaConf.create({"_target_": target, knob: -1}))


def test_a_karras_grid_outside_the_schedule_is_refused() -> None:
    with pytest.raises(UserError, match="nothing is left"):
        Karras(sigma_min=20.0, sigma_max=80.0)(SCHEDULE, 10)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_start_has_the_deviation_of_normalised_data_at_its_level(schedule: Schedule) -> None:
    times = Trailing()(schedule, 7)[2:]
    alpha, sigma, _, _ = schedule(times[:1])
    begun = start(torch.full((2, 3), 0.5, dtype=torch.float64), times, schedule)
    torch.testing.assert_close(begun, 0.5 * torch.hypot(alpha, sigma).expand(2, 3), rtol=1e-12, atol=0)


def test_an_images_noise_is_its_seeds_alone() -> None:
    many, one = ImageNoise([3, 4, 5, 6]), ImageNoise([5])
    for _ in range(3):
        assert torch.equal(many((4, 8, 8))[2], one((4, 8, 8))[0])
