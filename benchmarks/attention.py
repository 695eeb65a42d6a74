"""Self-attention forward and backward, torch's against ours in chunks: `python -m benchmarks.attention`.

By precision and width of the heads, at the size of a UNet's first level. `ldm.networks.chunked_attention.attend`
chooses between the two; this is what it chooses by.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import DTYPES, Contender, time_all
from ldm.networks.chunked_attention import MATRIX_UNITS, chunked_attention

HEADS = 8
WAYS: dict[str, Callable[..., Tensor]] = {
    "torch": nn.functional.scaled_dot_product_attention,
    "chunked": chunked_attention,
}


def contender(way: str, precision: str, width: int, batch: int, pixels: int, device: torch.device) -> Contender:
    made = torch.randn(3, batch, pixels, HEADS, width, device=device, dtype=DTYPES[precision])
    q, k, v = made.requires_grad_().transpose(2, 3)

    def run() -> object:
        out = WAYS[way](q, k, v)
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return Contender(way, precision, False, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="8,16,32,64")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    lines = [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {given.batch} x {HEADS} heads over "
        f"{given.pixels} pixels, {given.rounds} rounds; bfloat16 matrix units on this CPU: {MATRIX_UNITS}",
        "",
        "| precision | width | torch, ms (quartiles) | chunked, ms (quartiles) | times faster | peak, MB |",
        "|---|---|---|---|---|---|",
    ]
    for precision in DTYPES:
        for width in map(int, given.widths.split(",")):
            both = [contender(way, precision, width, given.batch, given.pixels, device) for way in WAYS]
            time_all(both, given.rounds, device)
            times = [(c.median_s * 1e3, *(value * 1e3 for value in c.quartiles_s())) for c in both]
            told = [f"{middle:.1f} ({low:.1f} to {high:.1f})" for middle, low, high in times]
            peaks = " and ".join("?" if c.peak_bytes is None else f"{c.peak_bytes / 1e6:.0f}" for c in both)
            ratio = times[0][0] / times[1][0]
            lines.append(f"| {precision} | {width} | {told[0]} | {told[1]} | {ratio:.2f} | {peaks} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
