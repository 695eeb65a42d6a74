"""DDIM (Song, Meng and Ermon 2020, "Denoising Diffusion Implicit Models")."""

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.sampling.sampler import Noise, OnStep, Sampler, batch_time, steps_of


class DDIM(Sampler):
    """Algorithm of eq. 12: go to x0, then back to the next level; eta = 0 is deterministic, eta = 1 is DDPM."""

    def __init__(self, eta: float = 0.0) -> None:
        if eta < 0:
            raise UserError(f"eta={eta}: expected 0 (deterministic) or more (1 is DDPM)")
        self.eta = eta

    def __call__(
        self,
        denoise: Denoise,
        z: Tensor,
        times: Tensor,
        schedule: Schedule,
        noise: Noise,
        on_step: OnStep = lambda done: None,
    ) -> Tensor:
        for done, (t, t_next) in enumerate(steps_of(times), start=1):
            x0, eps = denoise(z, batch_time(t, z))
            now, then = schedule(t), schedule(t_next)
            # Eq. 16 for any (alpha, sigma): eta times the deviation of DDPM's posterior.
            ratio = float(now.alpha * then.sigma / (now.sigma * then.alpha))
            fresh = self.eta * float(then.sigma) * max(1.0 - ratio**2, 0.0) ** 0.5
            kept = max(float(then.sigma) ** 2 - fresh**2, 0.0) ** 0.5
            z = float(then.alpha) * x0 + kept * eps
            if fresh:
                z = z + fresh * noise(tuple(z.shape[1:])).to(z)
            on_step(done)
        return z
