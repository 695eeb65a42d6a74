"""Time grids: the times that a sampler visits, from the noisiest to the last."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion.schedule import Discrete, Schedule, shifted
from ldm.errors import UserError

LOG_SNR_OF_NOISE, LOG_SNR_OF_DATA = -18.4, 13.8
"""First and last noise level of a grid where the schedule's are infinite: sigma / alpha 1e4 and 1e-3."""


class Grid(ABC):
    """Times for a number of steps: the network is called at all but the last, where the sample ends."""

    def __call__(self, schedule: Schedule, steps: int) -> Tensor:
        """Times [steps + 1], float64 on the CPU, strictly falling."""
        if steps < 1:
            raise UserError(f"steps={steps}: expected 1 or more")
        if isinstance(schedule, Discrete) and steps > len(schedule):
            raise UserError(f"steps={steps}: the schedule has {len(schedule)} times; use at most as many")
        return self.times(schedule, steps)

    @abstractmethod
    def times(self, schedule: Schedule, steps: int) -> Tensor:
        """The grid itself; `steps` has been checked."""


class Leading(Grid):
    """Stable Diffusion's grid: every (T // steps)-th time from `offset` up, ending at time 0.

    With T = 1000, 50 steps and offset 1: 981, 961, ..., 1, then 0 (CompVis `make_ddim_timesteps`; diffusers
    `timestep_spacing="leading"`, `steps_offset=1`, `set_alpha_to_one=False`).
    """

    def __init__(self, offset: int = 1) -> None:
        self.offset = offset

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        if not isinstance(schedule, Discrete):
            raise UserError("grid=leading needs a discrete schedule; use grid=trailing or grid=uniform_log_snr")
        stride = len(schedule) // steps
        offset = min(self.offset, schedule.t_max - (steps - 1) * stride)
        times = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * stride + offset
        last = schedule.t_min if times[-1] > schedule.t_min else schedule.t_clean
        return torch.cat([times, times.new_tensor([last])])


class Trailing(Grid):
    """Equal steps from the very noisiest time down to the data (Lin et al. 2023, table 2, "trailing")."""

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        return schedule.nearest(torch.linspace(schedule.t_max, schedule.t_clean, steps + 1, dtype=torch.float64))


class Linspace(Grid):
    """Equal steps from the noisiest time to the least noisy one, then the data (Lin et al. 2023, "linspace")."""

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        last = schedule.time_of_log_snr(torch.tensor(log_snr_of_ends(schedule)[1], dtype=torch.float64))
        times = torch.linspace(schedule.t_max, float(last), steps, dtype=torch.float64)
        return torch.cat([schedule.nearest(times), times.new_tensor([schedule.t_clean])])


class UniformLogSNR(Grid):
    """Equal steps in log-SNR, then the data (Lu et al. 2022, DPM-Solver)."""

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        first, last = log_snr_of_ends(schedule)
        times = schedule.time_of_log_snr(torch.linspace(first, last, steps, dtype=torch.float64))
        return torch.cat([times, times.new_tensor([schedule.t_clean])])


class Karras(Grid):
    """Equal steps in (sigma / alpha)^(1 / rho), then the data (Karras et al. 2022, eq. 5).

    `sigma_min` and `sigma_max` are the ends in sigma / alpha; null: the schedule's.
    """

    def __init__(self, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        if rho <= 0:
            raise UserError(f"rho={rho}: expected a number above 0 (the paper uses 7)")
        if not 0 < (sigma_min or 1e-9) < (sigma_max or 1e9):
            raise UserError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: expected 0 < sigma_min < sigma_max")
        self.rho, self.sigma_min, self.sigma_max = rho, sigma_min, sigma_max

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        noisiest, cleanest = (math.exp(-log_snr / 2) for log_snr in log_snr_of_ends(schedule))
        first = min(self.sigma_max or noisiest, noisiest)
        last = max(self.sigma_min or cleanest, cleanest)
        if last >= first:
            raise UserError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: nothing is left of the schedule's "
                f"{cleanest:g} to {noisiest:g}"
            )
        roots = torch.linspace(first ** (1 / self.rho), last ** (1 / self.rho), steps, dtype=torch.float64)
        times = schedule.time_of_log_snr(-2 * self.rho * torch.log(roots))
        return torch.cat([times, times.new_tensor([schedule.t_clean])])


class Shifted(Grid):
    """Another grid, its times moved towards the noise (Esser et al. 2024, eq. 23; see `schedule.shifted`)."""

    def __init__(self, grid: Grid, shift: float = 3.0) -> None:
        if shift <= 0:
            raise UserError(f"shift={shift}: expected a number above 0 (1 changes nothing)")
        self.grid, self.shift = grid, shift

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        return shifted(self.grid(schedule, steps), schedule, self.shift)


def log_snr_of_ends(schedule: Schedule) -> tuple[float, float]:
    """Log-SNR at the noisiest and at the least noisy time, both finite."""
    levels = schedule(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    first, last = levels.log_snr.tolist()
    return max(first, LOG_SNR_OF_NOISE), min(last, LOG_SNR_OF_DATA)
