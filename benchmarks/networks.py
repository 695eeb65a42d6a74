"""Our networks against diffusers' with the same architecture and weights: `python -m benchmarks.networks`.

Cases: unet_forward, unet_train, encode, decode, autoencoder_train. All contenders of a case take turns in
one process; the first row is diffusers in float32 as its training scripts use it. A train step is forward, backward
and AdamW. Sides:

ours          as a training here runs it: channels_last, fused AdamW, under autocast (bf16), on a CPU with its
              freed memory kept
diffusers     as its scripts run it: torch's memory layout, torch's default AdamW, under autocast (bf16)
diffusers +   channels_last and fused AdamW as well

"of convolution" and "of matrix product" are counted FLOPs over time, beside the best rate of a large convolution and
a large product in the same process at the same precision. --peak-tflops adds the fraction of a device's data sheet
(model FLOP utilisation). --profile prints where the time of the eager contenders goes instead of timing them.

Compiling takes minutes for each contender on a CPU, all of it most of an hour; each case is told when it is done.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import side_by_side as bench
from benchmarks.network_cases import CASES, Settings, our_unet
from benchmarks.side_by_side import Contender, progress
from ldm.versions import versions

MATRIX_UNITS = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()  # for bf16
AGREE = 1e-3  # ||difference|| / ||value|| of both sides' outputs in float32, before anything is timed


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
    parser.add_argument(
        "--precision", help="float32, bf16 or both, with a comma (both, where the device multiplies bf16 in hardware)"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="the compiled networks as well (yes)"
    )
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


def precisions_of(given: argparse.Namespace) -> list[str]:
    asked = given.precision.split(",") if given.precision else list(bench.DTYPES)
    if unknown := set(asked) - set(bench.DTYPES):
        raise SystemExit(f"--precision: there is no {sorted(unknown)}; there are {', '.join(bench.DTYPES)}")
    if not given.precision and given.device == "cpu" and not MATRIX_UNITS:
        progress("bf16 is left out: this CPU would emulate it; --precision float32,bf16 measures that")
        return ["float32"]
    return [name for name in bench.DTYPES if name in asked]


def settings_of(given: argparse.Namespace) -> Settings:
    width = 320 if given.full else 32 if given.small else 64
    return Settings(
        device=torch.device(given.device),
        precisions=precisions_of(given),
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
    tell(lines)
    record: dict[str, Any] = {
        "versions": facts,
        "settings": {key: str(value) for key, value in vars(s).items()} | {"rounds": given.rounds},
        "ceilings_flop_per_s": rate,
        "cases": {},
    }
    for name in chosen:
        progress(name)
        made = CASES[name](s)
        check_agreement(name, made)
        if given.profile:
            profile(made, s.device)
            continue
        count = bench.flops(made[0].run)
        bench.time_all(made, given.rounds, s.device, clock)
        lines = ["", f"{name}: {count / 1e9:.1f} GFLOP", "", *bench.table(made, count, rate)]
        if given.peak_tflops:
            best = min((c for c in made if c.precision == "bf16"), key=lambda c: c.median_s, default=made[0])
            used = count / best.median_s / given.peak_tflops / 1e12
            lines += ["", f"Model FLOP utilisation of {best.name}: {used:.1%} of {given.peak_tflops:g} TFLOP/s"]
        tell(lines)
        record["cases"][name] = bench.record(made, count, rate)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(record, indent=2) + "\n")
        del made


def tell(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
