"""Time grids: the times that a sampler visits, from the noisiest to the last."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion.schedule import Discrete, Schedule
from ldm.errors import UserError


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
        times = torch.linspace(schedule.t_max, schedule.t_clean, steps + 1, dtype=torch.float64)
        if isinstance(schedule, Discrete):
            times = times.round()
        return times


class UniformLogSNR(Grid):
    """Equal steps in log-SNR from t_max to t_min, then the data (Lu et al. 2022, DPM-Solver, section 4)."""

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        first = min(schedule.t_max, schedule.t_max * (1 - 1e-4) if schedule.t_max <= 1 else schedule.t_max)
        last = max(schedule.t_min, schedule.t_clean + 1e-3 if schedule.t_clean >= 0 else schedule.t_min)
        ends = schedule(torch.tensor([first, last], dtype=torch.float64)).log_snr
        log_snr = torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64)
        times = schedule.time_of_log_snr(log_snr)
        return torch.cat([times, times.new_tensor([schedule.t_clean])])
