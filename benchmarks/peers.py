"""diffusers' schedulers that do what our samplers do, with Stable Diffusion's schedule and 50 steps.

`tests/parity/test_samplers.py` holds each pair to the same trajectory, `benchmarks.samplers` times them.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from ldm.diffusion.schedule import ScaledLinear, Schedule
from ldm.sampling.ddim import DDIM
from ldm.sampling.ddpm import DDPM
from ldm.sampling.dpmpp_2m import DPMPP2M
from ldm.sampling.dpmpp_2m_sde import DPMPP2MSDE
from ldm.sampling.euler import Euler
from ldm.sampling.euler_ancestral import EulerAncestral
from ldm.sampling.grid import Grid, Karras, Leading, Trailing
from ldm.sampling.heun import Heun
from ldm.sampling.lms import LMS
from ldm.sampling.plms import PLMS
from ldm.sampling.sampler import Sampler
from ldm.sampling.unipc import UniPC

SD: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SD_LEADING = SD | {"timestep_spacing": "leading", "steps_offset": 1}
SD_DDIM = SD_LEADING | {"clip_sample": False, "set_alpha_to_one": False}
SD_PNDM = SD_LEADING | {"skip_prk_steps": True, "set_alpha_to_one": False}
TRAILING = SD | {"timestep_spacing": "trailing"}
KARRAS = SD | {"timestep_spacing": "linspace", "use_karras_sigmas": True}

STEPS = 50


class LeadingToTheData(Grid):
    """SD's times, then the data: k-diffusion's samplers, and diffusers' after them, end at sigma 0, not at time 0."""

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        times = Leading()(schedule, steps)
        return torch.cat([times[:-1], times.new_tensor([schedule.t_clean])])


class Peer(NamedTuple):
    """Our sampler and its times, and diffusers' scheduler with what its `step` is told."""

    sampler: Sampler
    times: Tensor
    scheduler: Callable[[], Any]
    scale: float  # of the scheduler's samples; those that keep sigmas have z / alpha in the place of z
    told: dict[str, Any]


KEEP_SIGMAS = ("Euler", "Heun", "LMS")


def peer(sampler: Sampler, grid: Grid, name: str, config: dict[str, Any], **told: Any) -> Peer:
    schedule = ScaledLinear()
    times = grid(schedule, STEPS)
    scale = 1.0 / float(schedule(times[0]).alpha) if name.startswith(KEEP_SIGMAS) else 1.0
    return Peer(sampler, times, lambda: getattr(diffusers, name)(**config), scale, told)


PEERS = {
    "ddim": peer(DDIM(), Leading(), "DDIMScheduler", SD_DDIM),
    "ddim, eta 1": peer(DDIM(1.0), Leading(), "DDIMScheduler", SD_DDIM, eta=1.0),
    "plms": peer(PLMS(), Leading(), "PNDMScheduler", SD_PNDM),
    "ddpm": peer(DDPM(), Trailing(), "DDPMScheduler", TRAILING | {"clip_sample": False}),
    "euler": peer(Euler(), LeadingToTheData(), "EulerDiscreteScheduler", SD_LEADING),
    "euler_ancestral": peer(EulerAncestral(), LeadingToTheData(), "EulerAncestralDiscreteScheduler", SD_LEADING),
    "heun": peer(Heun(), LeadingToTheData(), "HeunDiscreteScheduler", SD_LEADING),
    "lms": peer(LMS(), LeadingToTheData(), "LMSDiscreteScheduler", SD_LEADING),
    "dpmpp_2m": peer(DPMPP2M(), Trailing(), "DPMSolverMultistepScheduler", TRAILING),
    "dpmpp_2m_sde": peer(
        DPMPP2MSDE(), Trailing(), "DPMSolverMultistepScheduler", TRAILING | {"algorithm_type": "sde-dpmsolver++"}
    ),
    "unipc": peer(UniPC(), Trailing(), "UniPCMultistepScheduler", TRAILING | {"final_sigmas_type": "zero"}),
}
"""The shipped samplers, by the name of their configuration; after a comma, other knobs."""

MORE_PEERS = {
    "unipc, order 3": peer(
        UniPC(3),
        Trailing(),
        "UniPCMultistepScheduler",
        TRAILING | {"final_sigmas_type": "zero", "solver_order": 3},
    ),
    "euler, karras": peer(Euler(), Karras(), "EulerDiscreteScheduler", KARRAS),
    "heun, karras": peer(Heun(), Karras(), "HeunDiscreteScheduler", KARRAS),
    "lms, karras": peer(LMS(), Karras(), "LMSDiscreteScheduler", KARRAS),
    "ddim, trailing": peer(DDIM(), Trailing(), "DDIMScheduler", TRAILING | {"clip_sample": False}),
}
"""The same with other grids and orders."""


def scheduler_run(
    entry: Peer, scheduler: Any, network: Callable[[Tensor, Tensor], Tensor], z: Tensor, generator: torch.Generator
) -> Tensor:
    """diffusers' loop from z [B, ...] to the sample, after `set_timesteps`; network(z, t) with t a scalar."""
    takes = inspect.signature(scheduler.step).parameters
    told = entry.told | ({"generator": generator} if "generator" in takes else {})
    sample = z * entry.scale
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(out, t, sample, return_dict=False, **told)[0]
    return sample
