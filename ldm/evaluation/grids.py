"""Sheets of pictures for people: labelled samples, and originals above their reconstructions."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.reconstruction import psnr

SIDE = 144  # pixels at least of a picture on the sheet
MARGIN = 10
INK = (51, 51, 51)
FONT_SIZE, LINE = 13, 17  # pixels

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def labelled_grid(images: Sequence[Tensor], labels: Sequence[str], path: Path, columns: int = 8) -> None:
    """Writes a PNG of the images [3, H, W] in [0, 1] with their labels, wrapped to six lines at most, below them.

    Small pictures are enlarged by a whole number without smoothing, so that one sees what was made. They may be of
    different sizes.
    """
    if not images or len(images) != len(labels):
        raise UserError(f"{len(images)} images and {len(labels)} labels make no sheet")
    tiles = [tile(image) for image in images]
    width, height = (max(picture.size[side] for picture in tiles) for side in (0, 1))
    font = ImageFont.load_default(size=FONT_SIZE)
    wrapped = [wrap(label, font, width) for label in labels]
    columns = min(columns, len(tiles))
    tops, bottom = [], MARGIN
    for first in range(0, len(tiles), columns):
        tops.append(bottom)
        lines = max(len(text) for text in wrapped[first : first + columns])
        bottom += height + MARGIN + (lines * LINE + MARGIN // 2 if lines else 0)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, bottom), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, text) in enumerate(zip(tiles, wrapped, strict=True)):
        x, y = MARGIN + place % columns * (width + MARGIN), tops[place // columns]
        sheet.paste(picture, (x, y))
        for number, line in enumerate(text):
            draw.text((x, y + height + 4 + number * LINE), line, fill=INK, font=font)
    save_sheet(sheet, path)


def paired_grid(originals: Tensor, others: Tensor, path: Path, columns: int = 8) -> None:
    """Writes a PNG with the originals [B, 3, H, W] in [0, 1] above the others, and the PSNR of each pair."""
    if originals.shape != others.shape:
        raise UserError(f"originals {list(originals.shape)} and others {list(others.shape)} make no pairs")
    labels = [f"{ratio:.1f} dB" for ratio in psnr(others, originals).tolist()]
    font = ImageFont.load_default(size=FONT_SIZE)
    names, left = ("original", "decoded"), 80
    tiles = [(tile(a), tile(b)) for a, b in zip(originals, others, strict=True)]
    width, height = tiles[0][0].size
    block = 2 * (height + 2) + LINE + MARGIN
    columns = min(columns, len(tiles))
    size = (left + columns * (width + MARGIN), MARGIN + ceil(len(tiles) / columns) * block)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, pair in enumerate(tiles):
        x, y = left + place % columns * (width + MARGIN), MARGIN + place // columns * block
        for number, picture in enumerate(pair):
            sheet.paste(picture, (x, y + number * (height + 2)))
            if place % columns == 0:
                at = (left - MARGIN, y + number * (height + 2) + height // 2)
                draw.text(at, names[number], fill=INK, font=font, anchor="rm")
        draw.text((x + width // 2, y + 2 * height + 5), labels[place], fill=INK, font=font, anchor="ma")
    save_sheet(sheet, path)


def wrap(text: str, font: Font, width: float, most: int = 6) -> list[str]:
    """The lines of a text that are at most `width` pixels wide; longer words are broken.

    Of more than `most` lines the rest is left out, and the last ends in "...".
    """
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append("")
            for letter in word:
                if lines[-1] and font.getlength(lines[-1] + letter) > width:
                    lines.append("")
                lines[-1] += letter
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last.rstrip()}..."]
    return lines


def tile(image: Tensor) -> Image.Image:
    """A picture [3, H, W] in [0, 1] as it stands on a sheet: SIDE pixels at least, enlarged by a whole number."""
    pixels = (image.detach().float().clamp(0, 1).permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
    small = Image.fromarray(pixels)
    factor = max(1, ceil(SIDE / min(small.size)))
    return small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Writes a sheet as PNG, with its folder where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
