"""Sheets of pictures for people: labelled samples, and originals above their reconstructions."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.evaluation.evaluate import Row

SIDE = 160  # pixels at least of a picture on the sheet
MARGIN = 8


def labelled_grid(images: Sequence[Tensor], labels: Sequence[str], path: Path, columns: int = 8) -> None:
    """Writes a PNG of the images [3, H, W] in [0, 1] with their labels, wrapped, below them.

    Small pictures are enlarged by a whole number without smoothing, so that one sees what was made.
    """
    tiles = [_tile(image) for image in images]
    width, height = tiles[0].size
    font = ImageFont.load_default(size=13)
    wrapped = [textwrap.wrap(label, max(8, width // 7)) for label in labels]
    line = 16
    below = MARGIN + line * max(len(lines) for lines in wrapped)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    size = (columns * (width + MARGIN) + MARGIN, rows * (height + below + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, (tile, lines) in enumerate(zip(tiles, wrapped, strict=True)):
        x = MARGIN + place % columns * (width + MARGIN)
        y = MARGIN + place // columns * (height + below + MARGIN)
        sheet.paste(tile, (x, y))
        for number, text in enumerate(lines):
            draw.text((x, y + height + 3 + number * line), text, fill="#333333", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def paired_grid(originals: Tensor, others: Tensor, path: Path) -> None:
    """Writes a PNG with the originals [B, 3, H, W] in [0, 1] in one row and the others below them."""
    pairs = [torch.cat([a, b], dim=1) for a, b in zip(originals, others, strict=True)]
    labelled_grid(pairs, [""] * len(pairs), path, columns=len(pairs))


def draw_examples(rows: Sequence[Row], folder: Path) -> None:
    """Writes `reconstructions.png`, and `samples_SET_gSCALE.png` with captions for each set and guidance scale."""
    pictures = {row.set_name: row.examples for row in rows if row.source == "pictures"}
    for row in rows:
        if row.source == "reconstructions":
            name = f"reconstructions_{row.set_name}.png"
            paired_grid(pictures[row.set_name][:12], row.examples[:12], folder / name)
        if row.source == "samples":
            name = f"samples_{row.set_name}_g{row.result.protocol.guidance_scale:g}.png"
            labelled_grid(list(row.examples), row.captions, folder / name)


def _tile(image: Tensor) -> Image.Image:
    pixels = (image.detach().float().clamp(0, 1).permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
    tile = Image.fromarray(pixels)
    factor = max(1, SIDE // tile.width)
    return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)
