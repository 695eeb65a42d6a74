"""A network, the schedule it was trained on and what it predicts: under a condition, (z, t) -> (x0, eps)."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import Denoised, Prediction, Solution
from ldm.diffusion.schedule import Level, Schedule

Denoise = Callable[[Tensor, Tensor], Denoised]
"""A denoiser with its condition bound, which is all that a sampler sees: z [B, C, h, w], t [B] (on the CPU)."""

REMEMBERED_TIMES = 4096


class TimeFacts(NamedTuple):
    """What `Denoiser` needs of one time, as plain numbers."""

    network_time: float
    input_scale: float
    solution: Solution


class RowFacts(NamedTuple):
    """The same for a batch: the network's time as the tensor [B] that it is given."""

    network_time: Tensor
    input_scale: float
    solution: Solution


class Denoiser(nn.Module):
    """BucketSchedule a network's output into (x0, eps); refuses singular combinations when it is built."""

    def __init__(self, network: nn.Module, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        prediction.check(schedule)
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self._of_time: dict[float, TimeFacts] = {}
        self._of_rows: dict[tuple[float, int, torch.device], RowFacts] = {}

    def output(self, z: Tensor, t: Tensor, level: Level, inputs: dict[str, Tensor]) -> Tensor:
        """The network's raw output at z [B, C, h, w], times t [B] and their level [B], float32, shaped like z."""
        scale = self.prediction.input_scale(level.like(z))
        out: Tensor = self.network(z * scale, self.schedule.network_time(t).to(z.device), **inputs)
        return out.float()

    def bind(self, inputs: Mapping[str, Tensor]) -> Denoise:
        """The estimates (x0, eps) under a condition, `inputs` [B, ...] by name, as a function of z and t.

        Where all of t is one time, as in sampling, what depends on it is computed once and remembered. t is
        read for that, so keep it on the CPU: reading it from a GPU would wait for the GPU.
        """
        network, condition, known = self.network, dict(inputs), self._of_rows  # nn.Module's look-ups are slow

        def denoise(z: Tensor, t: Tensor) -> Denoised:
            times = t.tolist()
            time, rows = times[0], len(times)
            if times.count(time) < rows:
                level = self.schedule(t)
                return self.prediction.solve(z, self.output(z, t, level, condition).to(z.dtype), level.like(z))
            facts = known.get((time, rows, z.device)) or self._rows(time, rows, z.device)
            network_time, input_scale, solution = facts
            out: Tensor = network(z if input_scale == 1.0 else z * input_scale, network_time, **condition)
            return Denoised(z, out if out.dtype is z.dtype else out.to(z.dtype), solution)

        return denoise

    def prepare(self, times: Tensor) -> None:
        """Compute what depends on the times [T] of a run, all at once; what is not prepared is when it is met."""
        times = times.to(device="cpu", dtype=torch.float64)
        if all(time in self._of_time for time in times.tolist()):
            return
        if len(self._of_time) + len(times) > REMEMBERED_TIMES:
            self._of_time.clear()
        level = self.schedule(times)
        scales = self.prediction.input_scale(level).tolist()
        facts = map(TimeFacts, self.schedule.network_time(times).tolist(), scales, self.prediction.solutions(level))
        self._of_time.update(zip(times.tolist(), facts, strict=True))

    def _rows(self, time: float, rows: int, device: torch.device) -> RowFacts:
        if time not in self._of_time:
            self.prepare(torch.tensor([time], dtype=torch.float64))
        network_time, scale, solution = self._of_time[time]
        if len(self._of_rows) >= REMEMBERED_TIMES:
            self._of_rows.clear()
        with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training
            facts = RowFacts(torch.full((rows,), network_time, dtype=torch.float32, device=device), scale, solution)
        self._of_rows[time, rows, device] = facts
        return facts
