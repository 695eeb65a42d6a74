"""A network with its noise schedule and prediction type: under a condition, (z, t) -> (x0, eps)."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ldm.diffusion.prediction import Denoised, Prediction
from ldm.diffusion.schedule import Level, Schedule
from ldm.networks.protocol import DenoisingNetwork, check_network

Cond = Mapping[str, Tensor]
"""A condition as keyword arguments of the network (tokens, mask, vector, concat), each [B, ...]."""

Denoise = Callable[[Tensor, Tensor], Denoised]
"""A denoiser under a condition, which is all that a sampler sees: z [B, C, h, w], t [B] -> (x0, eps) shaped like z."""


class Denoiser(nn.Module):
    """Estimates (x0, eps) from a network's output.

    Raises UserError for a network without the attributes of `DenoisingNetwork`, and for a prediction type that is
    singular on the schedule.
    """

    def __init__(self, network: DenoisingNetwork, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        check_network(network)
        prediction.check(schedule)
        self.network: Any = network  # an nn.Module and a DenoisingNetwork
        self.schedule = schedule
        self.prediction = prediction

    def output(self, z: Tensor, t: Tensor, level: Level, cond: Cond) -> Tensor:
        """The network's raw output at z [B, C, h, w], times t [B] and their level (shaped like z): float32, like z."""
        scale = self.prediction.input_scale(level)
        out: Tensor = self.network(z * scale, self.schedule.network_time(t).to(z.device, non_blocking=True), **cond)
        return out.float()

    def bind(self, cond: Cond) -> Denoise:
        """The estimates under a condition as a function of z and t."""

        def denoise(z: Tensor, t: Tensor) -> Denoised:
            level = self.schedule(t).like(z)
            out = self.output(z, t, level, cond).to(z.dtype)
            return self.prediction.solve(z, out, level)

        return denoise
