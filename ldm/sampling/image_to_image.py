"""Image to image: sampling that starts from a noised picture, late on the time grid (Meng et al. 2021, SDEdit)."""

from math import floor

from torch import Tensor

from ldm.diffusion.schedule import Schedule, broadcast
from ldm.errors import UserError


def steps_made(steps: int, strength: float) -> int:
    """How many of `steps` run at an img2img strength in (0, 1]: that fraction, rounded down, at least one."""
    if not 0.0 < strength <= 1.0:
        raise UserError(f"strength={strength}: expected above 0 (keeps the picture) up to 1 (ignores it)")
    return max(1, floor(steps * strength + 1e-6))


def last_times(times: Tensor, strength: float) -> Tensor:
    """The end of a time grid [steps + 1] that image to image goes through: `steps_made` steps of it."""
    return times[len(times) - 1 - steps_made(len(times) - 1, strength) :]


def add_noise_at(x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """z = alpha x0 + sigma eps [B, ...] at a time t (a scalar)."""
    level = schedule(t)
    return broadcast(level.alpha, x0) * x0 + broadcast(level.sigma, x0) * eps
