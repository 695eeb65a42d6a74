"""Contenders timed side by side in one process: interleaved rounds, quartiles, peak memory, counted FLOPs, ceilings."""

import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.networks.cpu import MMAP_THRESHOLD, TRIM_THRESHOLD, LARGEST_bytes

Run = Callable[[], object]
Clock = Callable[[], float]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Contender:
    """One side of a comparison: who, at what precision (of DTYPES), eager or compiled, what is timed."""

    who: str
    precision: str
    compiled: bool
    run: Run
    prepare: Run | None = None  # called before each timed run
    times_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def name(self) -> str:
        return f"{self.who}, {'compiled ' if self.compiled else ''}{self.precision}"

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    def quartiles_s(self) -> tuple[float, float]:
        """The first and the third quartile (of fewer than two rounds: the only one)."""
        if len(self.times_s) < 2:
            return self.times_s[0], self.times_s[0]
        low, _, high = statistics.quantiles(self.times_s, n=4)
        return low, high


def faster(contender: Contender, than: Contender) -> float:
    """How many times: the median over the rounds of the ratio within a round, which a busy machine moves less."""
    return statistics.median(b / a for a, b in zip(contender.times_s, than.times_s, strict=True))


def progress(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stderr.flush()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """How long a run takes, on the device too."""
    synchronize(device)
    began = clock()
    run()
    synchronize(device)
    return clock() - began


def time_all(contenders: list[Contender], rounds: int, device: torch.device, clock: Clock = time.perf_counter) -> None:
    """Times every contender once a round, in an order that changes from round to round, after one run to warm up.

    `prepare` is called before each turn of a contender that has one, outside of its time.

    With time.process_time it is the processor's time that counts: what other processes take is left out, but the
    waiting of threads for one another counts as well, so it is a measure for one thread.
    """
    for contender in contenders:
        if contender.prepare:
            contender.prepare()
        took = seconds(contender.run, device, clock)
        progress(f"  {contender.name}: first run {took:.2f} s")
        contender.peak_bytes = peak_bytes(contender.run, device)
    order = random.Random(0)
    for number in range(1, rounds + 1):
        for contender in order.sample(contenders, len(contenders)):
            if contender.prepare:
                contender.prepare()
            contender.times_s.append(seconds(contender.run, device, clock))
        progress(f"  round {number} of {rounds}: " + ", ".join(f"{c.name} {c.times_s[-1]:.4g}" for c in contenders))


def give_freed_memory_back() -> None:
    """glibc's way of keeping freed memory after it has run for a while: thresholds that only grow, to these limits."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, LARGEST_bytes)  # malloc.c: DEFAULT_MMAP_THRESHOLD_MAX on 64 bits
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_bytes)
        libc.malloc_trim(0)


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """What a run needs at most beyond what was there before it; None where the system does not tell.

    On a GPU: of the allocator. On the CPU (Linux): of the process, by the kernel's own high-water mark.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
    except (OSError, AttributeError):
        return None
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def flops(run: Run) -> int:
    """Floating-point operations of a run, multiply and add counted apart, attention as the formula has it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def ceilings(device: torch.device, precision: str, small: bool) -> list[tuple[str, Run, float]]:
    """What the device does at its best, as (name, run, FLOPs): a large matrix product, and a 3x3 convolution."""
    dtype, on_gpu = DTYPES[precision], device.type == "cuda"
    n = 256 if small else 8192 if on_gpu else 2048
    batch, channels, side = (1, 32, 16) if small else (64, 512, 64) if on_gpu else (8, 256, 32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=dtype)
    conv = conv.to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    return [
        ("matrix product", lambda: a @ b, 2.0 * n**3),
        ("convolution", lambda: conv(x), 2.0 * 9 * channels**2 * batch * side**2),
    ]


def rates(
    device: torch.device, precisions: list[str], rounds: int, small: bool, clock: Clock = time.perf_counter
) -> dict[str, dict[str, float]]:
    """FLOP/s of the ceilings by precision and name: the best of several runs, each repeated for a while."""
    found: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for precision in precisions:
            found[precision] = {}
            for name, run, count in ceilings(device, precision, small):
                once = seconds(run, device, clock), seconds(run, device, clock)
                repeats = max(1, int((0.01 if small else 0.2) / once[1]))

                def several(run: Run = run, repeats: int = repeats) -> None:
                    for _ in range(repeats):
                        run()

                best = min(seconds(several, device, clock) for _ in range(rounds)) / repeats
                found[precision][name] = count / best
                progress(f"{name}, {precision}: {count / best / 1e9:.0f} GFLOP/s")
    return found


def table(contenders: list[Contender], count: int, rate: dict[str, dict[str, float]]) -> list[str]:
    """A row for each contender, compared with the first; `count` FLOPs, `rate` as `rates` gives it."""
    lines = [
        "| | median, s (quartiles) | least | times faster | GFLOP/s | of convolution | of matrix product | peak, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for contender in contenders:
        low, high = contender.quartiles_s()
        speed = count / contender.median_s
        own = rate[contender.precision]
        peak = "" if contender.peak_bytes is None else f"{contender.peak_bytes / 1e6:.0f}"
        lines.append(
            f"| {contender.name} | {contender.median_s:.4g} ({low:.4g} to {high:.4g}) "
            f"| {min(contender.times_s):.4g} | {faster(contender, contenders[0]):.2f} | {speed / 1e9:.1f} "
            f"| {speed / own['convolution']:.1%} | {speed / own['matrix product']:.1%} | {peak} |"
        )
    return lines


def record(contenders: list[Contender], count: int, rate: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The same as plain values."""
    rows = {}
    for contender in contenders:
        own = rate[contender.precision]
        rows[contender.name] = {
            "median_s": contender.median_s,
            "quartiles_s": contender.quartiles_s(),
            "times_s": contender.times_s,
            "times_faster": faster(contender, contenders[0]),
            "flop_per_s": count / contender.median_s,
            "of_convolution": count / contender.median_s / own["convolution"],
            "of_matrix_product": count / contender.median_s / own["matrix product"],
            "peak_bytes": contender.peak_bytes,
        }
    return {"flops": count, "contenders": rows}


def relative(given: Tensor, wanted: Tensor) -> float:
    """||given - wanted|| / ||wanted||."""
    given, wanted = given.detach().double(), wanted.detach().double()
    return float((given - wanted).norm() / wanted.norm())
