"""A network, the schedule it was trained on and what it predicts, as one function: (z, t) -> (x0, eps)."""

from collections.abc import Callable
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


class Denoiser(nn.Module):
    """Turns a network's output into (x0, eps); refuses singular combinations when it is built."""

    def __init__(self, network: nn.Module, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        prediction.check(schedule)
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self._facts: dict[float, TimeFacts] = {}

    def output(self, z: Tensor, t: Tensor, level: Level, inputs: dict[str, Tensor]) -> Tensor:
        """The network's raw output at z [B, C, h, w], times t [B] and their level [B], float32, shaped like z."""
        scale = self.prediction.input_scale(level.like(z))
        out: Tensor = self.network(z * scale, self.schedule.network_time(t).to(z.device), **inputs)
        return out.float()

    def forward(self, z: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Denoised:
        """The estimates (x0, eps) at z [B, C, h, w], t [B]; `inputs` are the condition's tensors by name.

        Where all of t is one time, as in sampling, what depends on it is computed once and remembered. t is
        read for that, so keep it on the CPU: reading it from a GPU would wait for the GPU.
        """
        times = t.tolist()
        if times.count(times[0]) < len(times):
            level = self.schedule(t)
            return self.prediction.solve(z, self.output(z, t, level, inputs).to(z.dtype), level.like(z))
        facts = self._facts.get(times[0]) or self._remember(times[0])
        network_time = torch.full((len(z),), facts.network_time, dtype=torch.float32, device=z.device)
        scaled = z if facts.input_scale == 1.0 else z * facts.input_scale
        out: Tensor = self.network(scaled, network_time, **inputs)
        return Denoised.solved(z, out.to(z.dtype), facts.solution)

    def _remember(self, t: float) -> TimeFacts:
        time = torch.tensor(t, dtype=torch.float64, device="cpu")
        level = self.schedule(time)
        facts = TimeFacts(
            float(self.schedule.network_time(time)),
            float(self.prediction.input_scale(level)),
            self.prediction.solution(level),
        )
        if len(self._facts) >= REMEMBERED_TIMES:
            self._facts.clear()
        self._facts[t] = facts
        return facts
