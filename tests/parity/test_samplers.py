"""Our samplers against diffusers' schedulers: the network is asked the same 50 times, and the samples are the same.

Where the two differ on purpose, so that no pair is here:
- Fractional times: diffusers interpolates sigma / alpha between the integer times, Karras grids apart; here its
  logarithm is, everywhere (as k-diffusion does it). On integer times, as here, and on Karras grids they agree.
- `DPMSolverMultistep` and `UniPC` round the times of a Karras grid that they give to the network; ours are exact.
- Their "leading" spacing divides by steps + 1 for a grid that ends elsewhere; ours is SD's. So these are compared on
  trailing times.
- Below 15 steps `DPMSolverMultistep` ends with a step of first order even where it does not end at the data.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from benchmarks.peers import MORE_PEERS, PEERS, STEPS, Peer, scheduler_run
from ldm.config.build import build
from ldm.config.compose import CONFIGS, compose
from ldm.config.trained import merge_sampling, sampling_settings
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Epsilon, V
from ldm.diffusion.schedule import ScaledLinear
from ldm.sampling.sampler import steps_of
from tests.networks.toy import ToyNetwork

from .names import relative

SCHEDULE = ScaledLinear()
# ||difference|| / ||value||. diffusers' alphas_cumprod (a product of up to 1000 factors) and sigmas are in float32
# whatever the samples' type, and samples in float64 differ as much: up to 1.4e-6.
TOLERANCE = 1e-5
ALL = PEERS | MORE_PEERS
SAMPLING = {"guidance": {"_target_": "ldm.sampling.guidance.ClassifierFree"}, "guidance_scale": 1.0}


class Network(ToyNetwork):
    """A noise estimate that depends on z and t in every number, and leads to bounded samples; notes its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.times: list[float] = []

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        self.inputs.append(z.clone())
        self.times.append(float(t.flatten()[0]))
        t = t.flatten()[:1]
        level = SCHEDULE(t).like(z)
        return level.sigma / (0.25 * level.alpha**2 + level.sigma**2) * z + 0.1 * torch.sin(3 * z + t / 100)


def ours(entry: Peer, z: Tensor) -> tuple[Network, Tensor]:
    network, generator = Network(), torch.Generator().manual_seed(1)
    denoiser = Denoiser(network, SCHEDULE, Epsilon())

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn((len(z), *shape), generator=generator)

    end = entry.sampler(denoiser.bind({}), z, steps_of(entry.times, SCHEDULE, len(z)), noise)
    return network, end


def theirs(entry: Peer, z: Tensor) -> tuple[Network, Tensor]:
    network, scheduler = Network(), entry.scheduler()
    scheduler.set_timesteps(STEPS)
    return network, scheduler_run(entry, scheduler, network, z, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ALL)
def test_the_trajectory_is_that_of_diffusers(name: str) -> None:
    agree(ALL[name])


def test_stable_diffusions_default_is_pndm_at_50_steps() -> None:
    """The command that docs/sample.md names for it, and the sheets of pictures of experiment=sd1."""
    overrides = ["checkpoint=x", "out=x", "sampler=plms", "grid=leading", "steps=50"]
    settings = sampling_settings(merge_sampling(SAMPLING, compose("sample", overrides)))
    agree(PEERS["plms"]._replace(sampler=settings.sampler, times=settings.times(SCHEDULE)))
    sheets = compose("train", ["experiment=sd1"]).sampling
    agree(PEERS["plms"]._replace(sampler=build(sheets.sampler), times=build(sheets.grid)(SCHEDULE, sheets.steps)))


def agree(entry: Peer) -> None:
    """Both ask the network the same, and end with the same sample."""
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (one, end), (other, expected) = ours(entry, z), theirs(entry, z)
    # Between the integers diffusers finds times from sigmas in float32, which are off by 1e-6 and rounded logarithms
    # by 2e-7, where a step of time is 3e-3 of the logarithm or more: up to 1.2e-3 is measured.
    assert one.times == pytest.approx(other.times, abs=5e-3)
    errors = [relative(a, b) for a, b in zip([*one.inputs, end], [*other.inputs, expected], strict=True)]
    assert max(errors) < TOLERANCE, errors


def test_v_prediction_gives_the_same_trajectory() -> None:
    """The same network taken for v, on SD 2's terms."""
    import diffusers

    from benchmarks.peers import SD_DDIM

    entry, z = PEERS["ddim"], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    network = Network()
    denoiser = Denoiser(network, SCHEDULE, V())
    end = entry.sampler(denoiser.bind({}), z, steps_of(entry.times, SCHEDULE, len(z)), lambda shape: z)
    scheduler: Any = diffusers.DDIMScheduler(**SD_DDIM, prediction_type="v_prediction")
    scheduler.set_timesteps(STEPS)
    assert relative(end, scheduler_run(entry, scheduler, Network(), z, torch.Generator())) < TOLERANCE


def test_every_shipped_sampler_has_a_peer() -> None:
    assert {name.split(",")[0] for name in PEERS} == {path.stem for path in (CONFIGS / "sampler").glob("*.yaml")}
