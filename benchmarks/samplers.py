"""Our samplers' own cost for each network call, beside diffusers' schedulers: python -m benchmarks.samplers.

The network is trivial (it gives a fixed tensor), so all that is timed is the sampler and, on our side, the denoiser
with its conversion to (x0, eps); on diffusers' side `scale_model_input` and `step`. What is done once for a run (our
levels, `set_timesteps`) is timed by itself. Noise is not drawn on either side; what drawing costs stands by itself.
A cost is that of one network call (Heun makes 99 in 50 steps, PLMS 51). Rounds are interleaved. Medians with quartiles
say what a machine gives; what the code needs is the least: of the times from one network call to the next, for each
call the shortest of all rounds, since a busy machine interrupts every whole run. Compare those.

The second table is a guided generation of 50 steps with a UNet, noise drawn, against its network calls alone.

    --only ddim/heun --rounds 100 --whole-rounds 0       fewer samplers, more rounds, the first table alone
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.peers import PEERS, STEPS, Peer, scheduler_run
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Epsilon, V
from ldm.diffusion.schedule import ScaledLinear
from ldm.networks.unet import UNet
from ldm.sampling.guidance import ClassifierFree
from ldm.sampling.noise import ImageNoise
from ldm.sampling.sampler import start, steps_of
from tests.networks.toy import ToyNetwork

SCHEDULE = ScaledLinear()
SHAPE = (4, 64, 64)
NAMES = list(PEERS)
NETWORK_CALLS = {"heun": 2 * STEPS - 1, "plms": STEPS + 1}
RANDOM = ("ddpm", "dpmsolver_multistep", "euler_ancestral_discrete", "ddim")


class Trivial(ToyNetwork):
    """A network that gives the same tensor whatever it is asked."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out
        self.called_at: list[float] = []

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        self.called_at.append(time.perf_counter())
        return self.out  # a plain call, as on diffusers' side

    forward = __call__

    def intervals(self, run: Callable[[], object], device: torch.device) -> list[float]:
        """The seconds from the beginning of a run to its first call, from each call to the next, and to the end."""
        self.called_at.clear()
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        return [b - a for a, b in pairwise([began, *self.called_at, time.perf_counter()])]


class Timed(ToyNetwork):
    """A network that adds up how long its calls take, on the device too."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.device = device
        self.seconds = 0.0

    def forward(self, z: Tensor, t: Tensor, **inputs: Tensor) -> Tensor:
        synchronize(self.device)
        began = time.perf_counter()
        out: Tensor = self.network(z, t, **inputs)
        synchronize(self.device)
        self.seconds += time.perf_counter() - began
        return out


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a run takes, on the device too."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def diffusers_noise(noise: Tensor) -> Iterator[None]:
    """diffusers' schedulers get this noise in the place of drawing it."""
    modules = [importlib.import_module(f"diffusers.schedulers.scheduling_{name}") for name in RANDOM]
    patches = [patch.object(module, "randn_tensor", lambda *args, **kwargs: noise) for module in modules]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def our_run(entry: Peer, denoiser: Denoiser, z: Tensor, noise: Tensor) -> tuple[Callable[[], object], ...]:
    """What is done once for a run, and the run of 50 steps itself."""
    denoise, steps = denoiser.bind({}), steps_of(entry.times, SCHEDULE, len(z))
    return (
        lambda: steps_of(entry.times, SCHEDULE, len(z)),
        lambda: entry.sampler(denoise, z, steps, lambda shape: noise),
    )


def their_run(entry: Peer, network: nn.Module, z: Tensor) -> tuple[Callable[[], object], ...]:
    """The same of diffusers' scheduler; the first has to go before each run."""
    scheduler, generator = entry.scheduler(), torch.Generator()
    return (
        lambda: scheduler.set_timesteps(STEPS, device=z.device),
        lambda: scheduler_run(entry, scheduler, network, z, generator),
    )


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return low, middle, high


def own_cost(names: Sequence[str], rounds: int, device: torch.device) -> Iterator[str]:
    """The lines of the first table, each as it is measured: microseconds for each network call."""
    z, out, noise = torch.randn(3, 1, *SHAPE, device=device)
    yield "| sampler | epsilon, µs (quartiles; least) | v, µs (least) | diffusers, µs (quartiles; least) | times less |"
    yield "|---|---|---|---|---|"
    network, of_a_run = Trivial(out), dict[str, list[float]](ours=[], diffusers=[])
    with torch.inference_mode(), diffusers_noise(noise):
        for name in names:
            once, runs = dict[str, Callable[[], object]](), dict[str, Callable[[], object]]()
            once["ours"], runs["epsilon"] = our_run(PEERS[name], Denoiser(network, SCHEDULE, Epsilon()), z, noise)
            _, runs["v"] = our_run(PEERS[name], Denoiser(network, SCHEDULE, V()), z, noise)
            once["diffusers"], runs["diffusers"] = their_run(PEERS[name], network, z)
            taken: dict[str, list[list[float]]] = {label: [] for label in runs}
            set_up: dict[str, list[float]] = {label: [] for label in once}
            for number in range(rounds + 1):  # the first one warms up
                for label, prepare in once.items():
                    set_up[label].append(seconds(prepare, device))
                for label, run in runs.items():
                    found = network.intervals(run, device)
                    if number:
                        taken[label].append(found)
            for label, found in set_up.items():
                of_a_run[label].append(min(found) * 1e6)
            yield own_line(name, taken)
    draw = ImageNoise([0], device)
    drawing = [seconds(lambda: draw(SHAPE), device) * 1e6 for _ in range(20 * rounds)]
    yield ""
    told = {label: f"{min(found):.0f} to {max(found):.0f}" for label, found in of_a_run.items()}
    yield f"Once for a run of 50 steps, at least: our levels {told['ours']} µs, set_timesteps {told['diffusers']} µs."
    yield f"Drawing the noise of one picture: {statistics.median(drawing):.0f} µs, at least {min(drawing):.0f}."


def own_line(name: str, taken: Mapping[str, list[list[float]]]) -> str:
    calls = NETWORK_CALLS.get(name, STEPS) / 1e6
    spread = {label: quartiles([sum(run) / calls for run in runs]) for label, runs in taken.items()}
    least = {label: sum(map(min, zip(*runs, strict=True))) / calls for label, runs in taken.items()}
    (low, ours, high), (low_peer, theirs, high_peer) = spread["epsilon"], spread["diffusers"]
    return (
        f"| {name} | {ours:.1f} ({low:.1f} to {high:.1f}; {least['epsilon']:.1f}) "
        f"| {spread['v'][1]:.1f} ({least['v']:.1f}) "
        f"| {theirs:.0f} ({low_peer:.0f} to {high_peer:.0f}; {least['diffusers']:.0f}) "
        f"| {theirs / ours:.1f} (of the least: {least['diffusers'] / least['epsilon']:.1f}) |"
    )


def whole_cost(names: Sequence[str], rounds: int, device: torch.device) -> Iterator[str]:
    """The lines of the second table: what a guided run of 50 steps takes beside its calls of a UNet."""
    torch.manual_seed(0)
    unet = UNet(4, 4, 32, channel_mult=(1, 2, 2), num_res_blocks=1, attention_levels=(False, False, True),
                head_channels=32, context_dim=128, groups=8)  # fmt: skip
    network = Timed(unet.eval().to(device), device)
    denoiser = Denoiser(network, SCHEDULE, V())
    tokens, nothing = torch.randn(2, 1, 77, 128, device=device)
    guidance = ClassifierFree()

    def generate(entry: Peer) -> None:
        noise = ImageNoise([0], device)
        denoise = guidance(denoiser, {"tokens": tokens}, {"tokens": nothing}, 7.5)
        entry.sampler(denoise, start(noise(SHAPE), entry.times, SCHEDULE), steps_of(entry.times, SCHEDULE, 1), noise)

    calls: list[float] = []
    lines = ["| sampler | more than the network's calls, % (quartiles) | ms a picture |", "|---|---|---|"]
    with torch.inference_mode():
        generate(PEERS["ddim"])
        for name in names:
            more: list[float] = []
            own: list[float] = []
            for _ in range(max(rounds, 2)):
                network.seconds = 0.0
                whole = seconds(lambda e=PEERS[name]: generate(e), device)  # type: ignore[misc]
                more.append((whole / network.seconds - 1.0) * 100)
                own.append((whole - network.seconds) * 1e3)
                calls.append(network.seconds / NETWORK_CALLS.get(name, STEPS) * 1e3)
            low, middle, high = quartiles(more)
            lines.append(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {statistics.median(own):.1f} |")
    size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    yield f"A UNet of {size:.1f}M parameters, {statistics.median(calls):.1f} ms a call of two rows (guidance):"
    yield ""
    yield from lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--whole-rounds", type=int, default=3, help="0 leaves the second table out")
    parser.add_argument("--only", default="/".join(NAMES), help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a file for the tables as well, e.g. benchmarks/results/samplers.md")
    given = parser.parse_args()
    device, names = torch.device(given.device), given.only.split("/")
    if unknown := set(names) - set(NAMES):
        parser.error(f"--only: {', '.join(sorted(unknown))}: there is no such sampler; there are {', '.join(NAMES)}")
    torch.set_num_threads(1)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"
    written: list[str] = []
    lines = [f"torch {torch.__version__}, {what}, latents 1 x {SHAPE}, {given.rounds} rounds", ""]
    tables = own_cost(names, max(given.rounds, 2), device)
    if given.whole_rounds:
        tables = chain(tables, [""], whole_cost(names, given.whole_rounds, device))
    for line in chain(lines, tables):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        written.append(line)
    if given.out:
        given.out.write_text("\n".join(written) + "\n")


if __name__ == "__main__":
    main()
