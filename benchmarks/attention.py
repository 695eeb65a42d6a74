"""Attention forward and backward, torch's kernel on two layouts: `python -m benchmarks.attention`.

By precision and width of the heads, at the size of a UNet's first level, over its pixels and (--keys 77) to tokens.
"torch" gets what the projections give, "laid out" what `ldm.networks.cpu` makes of it.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.side_by_side import DTYPES, Contender, faster, time_all
from ldm.networks import cpu

HEADS = 8
WAYS: dict[str, Callable[..., Tensor]] = {
    "torch": functional.scaled_dot_product_attention,
    "laid out": cpu.scaled_dot_product_attention,
}


def contender(way: str, precision: str, width: int, given: argparse.Namespace) -> Contender:
    q, k, v = (
        torch.randn(given.batch, n, HEADS, width, device=given.device, dtype=DTYPES[precision])
        .requires_grad_()
        .transpose(1, 2)
        for n in (given.pixels, given.keys or given.pixels, given.keys or given.pixels)
    )

    def run() -> object:
        out = WAYS[way](q, k, v)
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return Contender(way, precision, False, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="8,16,32,64")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--keys", type=int, help="tokens that are attended to (the pixels themselves)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    lines = [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {given.batch} x {HEADS} heads, {given.pixels} "
        f"pixels to {given.keys or given.pixels} keys, {given.rounds} rounds",
        "",
        "| precision | width | way | ms (quartiles) | times faster than torch | peak, MB |",
        "|---|---|---|---|---|---|",
    ]
    for precision in DTYPES:
        for width in map(int, given.widths.split(",")):
            ways = [contender(way, precision, width, given) for way in WAYS]
            time_all(ways, given.rounds, device)
            for c in ways:
                low, high = (value * 1e3 for value in c.quartiles_s())
                peak = "?" if c.peak_bytes is None else f"{c.peak_bytes / 1e6:.0f}"
                lines.append(
                    f"| {precision} | {width} | {c.who} | {c.median_s * 1e3:.1f} ({low:.1f} to {high:.1f}) "
                    f"| {faster(c, ways[0]):.2f} | {peak} |"
                )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
