"""Our networks against diffusers' with the same architecture and weights: `python -m benchmarks.networks`.

Cases: unet_forward, unet_train, encode, decode, autoencoder_train. All contenders of a case take turns in
one process; the first row is diffusers in float32 as its training scripts use it. A train step is forward, backward
and AdamW. Sides:

ours          as a training here runs it: channels_last, fused AdamW, under autocast with kept weights (bf16), on a
              CPU with its freed memory kept
diffusers     as its scripts run it: torch's memory layout, torch's default AdamW, under autocast (bf16)
diffusers +   channels_last and fused AdamW as well

"of convolution" and "of matrix product" are counted FLOPs over time, beside the best rate of a large convolution and
a large product in the same process at the same precision. --peak-tflops adds the fraction of a device's data sheet
(model FLOP utilisation). --profile prints where the time of the eager contenders goes instead of timing them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks import side_by_side as bench
from benchmarks.side_by_side import Contender, Run, progress
from ldm.config.versions import versions
from ldm.first_stage.autoencoder import FirstStage
from ldm.first_stage.bottleneck import KLBottleneck
from ldm.interop.names import first_stage_to_diffusers, unet_to_diffusers
from ldm.networks.autoencoder import Decoder, Encoder
from ldm.networks.unet import UNet
from ldm.training.freed_memory import keep_freed_memory
from ldm.training.kept_weights import keep_weights
from tests.parity.names import copy_weights, spread

AGREE = 1e-3  # ||difference|| / ||value|| of both sides' outputs in float32, before anything is timed


@dataclass(frozen=True)
class Settings:
    """What is measured, and on what."""

    device: torch.device
    precisions: list[str]
    compiled: bool
    unet_channels: int
    context_dim: int
    batch: int
    latent: int
    first_stage_channels: int
    images: int
    pixels: int
    small: bool


@dataclass(frozen=True)
class Side:
    """A way to run a network: whose, and with what settings."""

    who: str
    ours: bool
    channels_last: bool
    fused: bool


SIDES = (Side("diffusers", False, False, False), Side("diffusers +", False, True, True), Side("ours", True, True, True))
Case = Callable[[Settings], list[Contender]]


def contenders(s: Settings, make: Callable[[Side, str], tuple[list[nn.Module], Run]]) -> list[Contender]:
    """Every side at every precision, eager and, where asked, compiled; `make` gives the networks and what is timed."""
    found = []
    for compiled in [False, True] if s.compiled else [False]:
        for precision in s.precisions:
            for side in SIDES:
                if compiled and side.who == "diffusers":
                    continue  # "diffusers +" is the stronger
                networks, run = make(side, precision)
                if compiled:
                    for network in networks:
                        network.compile()
                elif side.ours:
                    for network in networks:
                        keep_weights(network)
                timed = autocast(run, side, s.device, precision)
                found.append(Contender(side.who, precision, compiled, timed, memory(side, s.device)))
    return found


def autocast(run: Run, side: Side, device: torch.device, precision: str) -> Run:
    """The run, under autocast where the precision is bf16: ours as Lightning enters it, diffusers' as torch does."""

    def under() -> object:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=not side.ours):
            return run()

    return under


def memory(side: Side, device: torch.device) -> Run | None:
    """What sets a side's handling of freed memory: ours as train.py does it on a CPU, diffusers' as it comes."""
    if device.type != "cpu":
        return None
    return keep_freed_memory if side.ours else bench.give_freed_memory_back


def placed(module: nn.Module, side: Side, device: torch.device) -> nn.Module:
    memory_format = torch.channels_last if side.channels_last else torch.contiguous_format
    return module.to(device).to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]


def train_step(parameters: list[nn.Parameter], side: Side, loss: Callable[[], Tensor]) -> Run:
    """Forward, backward, AdamW; backward and optimizer outside of autocast, as autocast asks."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True if side.fused else None)

    def step() -> None:
        value = loss()
        with torch.autocast(value.device.type, enabled=False):
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


# ------------------------------------------------------------------------------------------------------- UNet


def our_unet(s: Settings) -> UNet:
    torch.manual_seed(0)
    unet = UNet(
        4, 4, s.unet_channels, (1, 2, 4, 4), 2, (True, True, True, False), num_heads=8, context_dim=s.context_dim
    )
    spread(unet)
    return unet


def their_unet(s: Settings) -> nn.Module:
    ours = our_unet(s)
    peer = diffusers.UNet2DConditionModel(
        block_out_channels=tuple(s.unet_channels * mult for mult in (1, 2, 4, 4)),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=8,  # diffusers means the number of heads
        cross_attention_dim=s.context_dim,
    )
    copy_weights(ours, peer, unet_to_diffusers(dict(ours.named_parameters())))
    return peer


def unet_call(side: Side, s: Settings) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The network, and its output for inputs that are the same for all."""
    network = placed(our_unet(s) if side.ours else their_unet(s), side, s.device)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(s.batch, 4, s.latent, s.latent, generator=random).to(s.device)
    t = torch.linspace(0, 999, s.batch).round().to(s.device)
    tokens = torch.randn(s.batch, 77, s.context_dim, generator=random).to(s.device)
    if side.ours:
        return network, lambda: network(x, t, tokens)
    return network, lambda: network(x, t, tokens, return_dict=False)[0]


def unet_forward(s: Settings) -> list[Contender]:
    def make(side: Side, precision: str) -> tuple[list[nn.Module], Run]:
        network, call = unet_call(side, s)
        return [network.eval()], torch.no_grad()(call)

    return contenders(s, make)


def unet_train(s: Settings) -> list[Contender]:
    target = torch.randn(s.batch, 4, s.latent, s.latent, device=s.device)

    def make(side: Side, precision: str) -> tuple[list[nn.Module], Run]:
        network, call = unet_call(side, s)
        network.train()
        return [network], train_step(
            list(network.parameters()), side, lambda: (call().float() - target).square().mean()
        )

    return contenders(s, make)


# ------------------------------------------------------------------------------------------------ autoencoder


def our_autoencoder(s: Settings) -> FirstStage:
    torch.manual_seed(0)
    width, mult = s.first_stage_channels, (1, 2, 4, 4)
    return FirstStage(Encoder(3, width, mult, 2, 8), KLBottleneck(), Decoder(4, width, mult, 2), latent_channels=4)


def their_autoencoder(s: Settings) -> nn.Module:
    ours = our_autoencoder(s)
    peer = diffusers.AutoencoderKL(
        block_out_channels=tuple(s.first_stage_channels * mult for mult in (1, 2, 4, 4)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    copy_weights(ours, peer, first_stage_to_diffusers(dict(ours.named_parameters())))
    return peer


def autoencoder(side: Side, s: Settings) -> tuple[Any, list[nn.Module]]:
    """The autoencoder, and its parts that are compiled."""
    made: Any = placed(our_autoencoder(s) if side.ours else their_autoencoder(s), side, s.device)
    return made, [made.encoder, made.decoder]


def pictures(s: Settings) -> Tensor:
    values = torch.rand(s.images, 3, s.pixels, s.pixels, generator=torch.Generator().manual_seed(2))
    return (values * 2 - 1).to(s.device)


def encode(s: Settings) -> list[Contender]:
    images = pictures(s)

    def make(side: Side, precision: str) -> tuple[list[nn.Module], Run]:
        model, networks = autoencoder(side, s)
        model.eval()
        call = (lambda: model.encode(images)) if side.ours else (lambda: model.encode(images).latent_dist.mode())
        return networks, torch.no_grad()(call)

    return contenders(s, make)


def decode(s: Settings) -> list[Contender]:
    z = torch.randn(s.images, 4, s.pixels // 8, s.pixels // 8, generator=torch.Generator().manual_seed(3))
    z = z.to(s.device)

    def make(side: Side, precision: str) -> tuple[list[nn.Module], Run]:
        model, networks = autoencoder(side, s)
        model.eval()
        call = (lambda: model.decode(z)) if side.ours else (lambda: model.decode(z, return_dict=False)[0])
        return networks, torch.no_grad()(call)

    return contenders(s, make)


def autoencoder_train(s: Settings) -> list[Contender]:
    images = pictures(s)
    noise = torch.randn(s.images, 4, s.pixels // 8, s.pixels // 8, device=s.device)

    def make(side: Side, precision: str) -> tuple[list[nn.Module], Run]:
        model, networks = autoencoder(side, s)
        model.train()

        def ours() -> Tensor:
            reconstruction, bottlenecked = model(images, noise)
            return (reconstruction.float() - images).abs().mean() + 1e-6 * bottlenecked.loss.float().mean()

        def theirs() -> Tensor:
            posterior = model.encode(images).latent_dist
            reconstruction = model.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
            return (reconstruction.float() - images).abs().mean() + 1e-6 * posterior.kl().float().mean()

        return networks, train_step(list(model.parameters()), side, ours if side.ours else theirs)

    return contenders(s, make)


CASES: dict[str, Case] = {
    "unet_forward": unet_forward,
    "unet_train": unet_train,
    "encode": encode,
    "decode": decode,
    "autoencoder_train": autoencoder_train,
}


def check_agreement(name: str, made: list[Contender]) -> None:
    """Both sides' outputs in float32 are the same numbers, so the same work is timed."""
    outs = [c.run() for c in made if c.precision == "float32" and not c.compiled]
    outs = [out for out in outs if isinstance(out, Tensor)]
    for out in outs[1:]:
        difference = bench.relative(out, outs[0])
        if difference > AGREE:
            raise SystemExit(f"{name}: the sides differ by {difference:.2g} in float32")


def profile(made: list[Contender], device: torch.device) -> None:
    """Where the time of the eager contenders goes, by operator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_device_time_total"
    for contender in made:
        if not contender.compiled:
            contender.run()
            with torch.profiler.profile(activities=activities) as found:
                contender.run()
            sys.stdout.write(f"\n{contender.name}\n{found.key_averages().table(sort_by=key, row_limit=18)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas (all)")
    parser.add_argument("--precision", default="float32,bf16", help="float32, bf16 or both (both)")
    parser.add_argument("--compile", action="store_true", help="the compiled networks as well")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (torch's default)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="the processor's time, not the clock's: where others work beside it; one thread",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="SD 1's width (860M), context 768")
    size.add_argument("--small", action="store_true", help="for trying it out: some seconds")
    parser.add_argument("--batch", type=int, help="of the UNet (8)")
    parser.add_argument("--latent", type=int, help="side of the latents (32: pictures of 256)")
    parser.add_argument("--images", type=int, help="in the autoencoder's batch (1)")
    parser.add_argument("--peak-tflops", type=float, help="of the device's data sheet, for bf16")
    parser.add_argument("--profile", action="store_true", help="operators instead of times")
    parser.add_argument("--out", type=Path, help="a JSON file, e.g. benchmarks/results/networks_cpu.json")
    return parser


def settings_of(given: argparse.Namespace) -> Settings:
    width = 320 if given.full else 32 if given.small else 64
    return Settings(
        device=torch.device(given.device),
        precisions=[name for name in bench.DTYPES if name in given.precision.split(",")],
        compiled=given.compile,
        unet_channels=width,
        context_dim=768 if given.full else 64 if given.small else 256,
        batch=given.batch or (2 if given.small else 8),
        latent=given.latent or (8 if given.small else 32),
        first_stage_channels=32 if given.small else 128,
        images=given.images or 1,
        pixels=8 * (given.latent or (8 if given.small else 32)),
        small=given.small,
    )


def told_of(s: Settings, facts: dict[str, str], rounds: int, clock: str) -> str:
    """What is measured, on what, in a line or two."""
    parameters = sum(p.numel() for p in our_unet(s).parameters())
    return (
        f"torch {torch.__version__}, diffusers {facts['diffusers']}, {facts['device']}, {facts['threads']} threads, "
        f"{rounds} rounds, {clock} time. UNet of {parameters / 1e6:.1f}M parameters, batch {s.batch}, latents of "
        f"{s.latent}; autoencoder of width {s.first_stage_channels}, {s.images} x {s.pixels} px."
    )


def main() -> None:
    given = _parser().parse_args()
    chosen = given.only.split(",")
    if unknown := set(chosen) - set(CASES):
        raise SystemExit(f"--only: there is no {sorted(unknown)}; there are {', '.join(CASES)}")
    if given.threads or given.cpu_time:
        torch.set_num_threads(given.threads or 1)
    clock = time.process_time if given.cpu_time else time.perf_counter
    torch.backends.cudnn.benchmark = True
    s = settings_of(given)
    facts = versions() | {"diffusers": version("diffusers"), "threads": str(torch.get_num_threads())}
    lines = [told_of(s, facts, given.rounds, "processor" if given.cpu_time else "clock")]
    rate = bench.rates(s.device, s.precisions, 3, s.small, clock)
    for precision, by_name in rate.items():
        told = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in by_name.items())
        lines.append(f"{precision}: {told}.")
    results: dict[str, Any] = {}
    for name in chosen:
        progress(name)
        made = CASES[name](s)
        check_agreement(name, made)
        if given.profile:
            profile(made, s.device)
            continue
        count = bench.flops(made[0].run)
        bench.time_all(made, given.rounds, s.device, clock)
        lines += ["", f"{name}: {count / 1e9:.1f} GFLOP", "", *bench.table(made, count, rate)]
        if given.peak_tflops:
            best = min((c for c in made if c.precision == "bf16"), key=lambda c: c.median_s, default=made[0])
            used = count / best.median_s / given.peak_tflops / 1e12
            lines += ["", f"Model FLOP utilisation of {best.name}: {used:.1%} of {given.peak_tflops:g} TFLOP/s"]
        results[name] = bench.record(made, count, rate)
        del made
    sys.stdout.write("\n".join(lines) + "\n")
    if given.out:
        settings = {key: str(value) for key, value in vars(s).items()} | {"rounds": given.rounds}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        text = {"versions": facts, "settings": settings, "ceilings_flop_per_s": rate, "cases": results}
        given.out.write_text(json.dumps(text, indent=2) + "\n")


if __name__ == "__main__":
    main()
