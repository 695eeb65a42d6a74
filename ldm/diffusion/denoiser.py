"""A network, the schedule it was trained on and what it predicts, as one function: (z, t) -> (x0, eps)."""

from collections.abc import Callable

from torch import Tensor, nn

from ldm.diffusion.prediction import Denoised, Prediction
from ldm.diffusion.schedule import Schedule

Denoise = Callable[[Tensor, Tensor], Denoised]
"""A denoiser with its condition bound, which is all that a sampler sees: z [B, C, h, w], t [B]."""


class Denoiser(nn.Module):
    """Turns a network's output into (x0, eps); refuses singular combinations when it is built."""

    def __init__(self, network: nn.Module, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        prediction.check(schedule)
        self.network = network
        self.schedule = schedule
        self.prediction = prediction

    def output(self, z: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The network's raw output at z [B, C, h, w] and times t [B], float32, shaped like z."""
        out: Tensor = self.network(z, self.schedule.network_time(t), **inputs)
        return out.float()

    def forward(self, z: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Denoised:
        """The estimates (x0, eps) at z [B, C, h, w], t [B]; `inputs` are the condition's tensors by name."""
        level = self.schedule(t).like(z)
        return self.prediction.solve(z, self.output(z, t, inputs).to(z.dtype), level)
