"""What a sampling step costs beside the network, ours and diffusers' in one process: `python -m benchmarks.samplers`.

The network is trivial (it gives a fixed tensor), so all that is timed is the sampler and, on our side, the denoiser
with its conversion to (x0, eps), the levels of the grid included. On diffusers' side `scale_model_input` and `step`
are timed, `set_timesteps` is not. Noise is not drawn on either side; what drawing costs stands by itself.
A cost is that of one network call (Heun makes 99 in 50 steps, PLMS 51). Rounds are interleaved; medians, quartiles.

The second table is a whole generation of 50 steps with a UNet against its network calls alone.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.peers import PEERS, STEPS, Peer, scheduler_run
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Epsilon, Prediction, V
from ldm.diffusion.schedule import ScaledLinear
from ldm.networks.unet import UNet
from ldm.sampling.noise import ImageNoise

SCHEDULE = ScaledLinear()
SHAPE = (4, 64, 64)
NETWORK_CALLS = {"heun": 2 * STEPS - 1, "plms": STEPS + 1}
RANDOM = ("ddpm", "dpmsolver_multistep", "euler_ancestral_discrete", "ddim")


class Trivial(nn.Module):
    """A network that gives the same tensor whatever it is asked."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.out


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


def our_run(entry: Peer, denoiser: Denoiser, z: Tensor, noise: Tensor) -> Callable[[], object]:
    """Our whole run of 50 steps."""

    def denoise(z: Tensor, t: Tensor) -> object:
        return denoiser(z, t, {})

    return lambda: entry.sampler(denoise, z, entry.times, SCHEDULE, lambda shape: noise)  # type: ignore[arg-type]


def their_run(entry: Peer, z: Tensor, out: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """What resets diffusers' scheduler, and its whole run of 50 steps."""
    scheduler, generator = entry.scheduler(), torch.Generator()
    return (
        lambda: scheduler.set_timesteps(STEPS, device=z.device),
        lambda: scheduler_run(entry, scheduler, lambda z, t: out, z, generator),
    )


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return low, middle, high


def own_cost(rounds: int, device: torch.device) -> list[str]:
    """The first table: microseconds for each network call."""
    z, out, noise = torch.randn(3, 1, *SHAPE, device=device)
    lines = [
        "| sampler | epsilon, µs (quartiles) | v, µs | diffusers, µs (quartiles) | times less |",
        "|---|---|---|---|---|",
    ]
    predictions: dict[str, Prediction] = {"epsilon": Epsilon(), "v": V()}
    taken: dict[str, dict[str, list[float]]] = {name: {"epsilon": [], "v": [], "diffusers": []} for name in PEERS}
    with torch.inference_mode(), diffusers_noise(noise):
        for number in range(rounds + 1):  # the first one warms up
            for name, entry in PEERS.items():
                found = {}
                for label, prediction in predictions.items():
                    denoiser = Denoiser(Trivial(out), SCHEDULE, prediction)
                    run = our_run(entry, denoiser, z, noise)
                    run()
                    found[label] = seconds(run, device)
                reset, run = their_run(entry, z, out)
                reset()
                run()
                reset()
                found["diffusers"] = seconds(run, device)
                if number:
                    calls = NETWORK_CALLS.get(name, STEPS)
                    for label, value in found.items():
                        taken[name][label].append(value / calls * 1e6)
    for name, times in taken.items():
        low, ours, high = quartiles(times["epsilon"])
        low_peer, theirs, high_peer = quartiles(times["diffusers"])
        v = quartiles(times["v"])[1]
        lines.append(
            f"| {name} | {ours:.1f} ({low:.1f} to {high:.1f}) | {v:.1f} "
            f"| {theirs:.0f} ({low_peer:.0f} to {high_peer:.0f}) | {theirs / ours:.1f}, {theirs / v:.1f} |"
        )
    draw = ImageNoise([0], device)
    drawing = [seconds(lambda: draw(SHAPE), device) * 1e6 for _ in range(20 * rounds)]
    return [*lines, "", f"Drawing the noise of one picture: {statistics.median(drawing):.0f} µs."]


def whole_cost(rounds: int, device: torch.device) -> list[str]:
    """The second table: 50 steps with a UNet against its calls alone."""
    torch.manual_seed(0)
    unet = UNet(4, 4, 48, channel_mult=(1, 2, 2), num_res_blocks=1, attention_levels=(False, True, True),
                head_channels=48, context_dim=128, groups=8)  # fmt: skip
    network = unet.eval().to(device)
    z, noise = torch.randn(2, 1, *SHAPE, device=device)
    inputs = {"tokens": torch.randn(1, 77, 128, device=device)}
    denoiser, t = Denoiser(network, SCHEDULE, V()), torch.full((1,), 500.0, device=device)
    taken: dict[str, list[float]] = {name: [] for name in PEERS}
    calls_of: list[float] = []

    def alone(calls: int) -> None:
        for _ in range(calls):
            network(z, t, **inputs)

    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, entry in PEERS.items():
                calls = NETWORK_CALLS.get(name, STEPS)
                before = seconds(lambda n=calls: alone(n), device)  # type: ignore[misc]
                run = lambda e=entry: e.sampler(  # noqa: E731
                    lambda z, t: denoiser(z, t, inputs), z, e.times, SCHEDULE, lambda shape: noise
                )
                whole = seconds(run, device)
                after = seconds(lambda n=calls: alone(n), device)  # type: ignore[misc]
                if number:
                    taken[name].append(whole / ((before + after) / 2) * 100 - 100)
                    calls_of.append((before + after) / 2 / calls * 1e3)
    lines = [
        f"A UNet of 3.8M parameters, {statistics.median(calls_of):.1f} ms a call; a whole run beside its calls alone:",
        "",
        "| sampler | more, % (quartiles) |",
        "|---|---|",
    ]
    for name, more in taken.items():
        low, middle, high = quartiles(more)
        lines.append(f"| {name} | {middle:+.2f} ({low:+.2f} to {high:+.2f}) |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--whole-rounds", type=int, default=5, help="0 leaves the second table out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a file for the tables as well, e.g. benchmarks/results/samplers.md")
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.set_num_threads(1)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"
    lines = [f"torch {torch.__version__}, {what}, latents 1 x {SHAPE}, {given.rounds} rounds", ""]
    lines += own_cost(given.rounds, device)
    if given.whole_rounds:
        lines += ["", *whole_cost(given.whole_rounds, device)]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
