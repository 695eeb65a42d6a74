"""Pictures side by side, with words, as one image to look at."""

from collections.abc import Sequence
from math import ceil

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.errors import UserError

INK, PAPER = (40, 40, 40), (255, 255, 255)
GAP = 10  # pixels between pictures and around them
MIN_SIDE = 144  # smaller pictures are enlarged to at least this, by a whole factor

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_pictures(images: Tensor, min_side: int = MIN_SIDE) -> list[Image.Image]:
    """Pillow images of a batch [B, 3, H, W] in [0, 1]; small ones enlarged by whole factors, unsmoothed."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"a grid is of images [B, 3, H, W], not {list(images.shape)}")
    height, width = images.shape[-2:]
    factor = max(1, ceil(min_side / min(height, width)))
    pixels = (images.detach().float().cpu().clamp(0.0, 1.0) * 255.0).round().byte()
    pictures = [Image.fromarray(np.ascontiguousarray(p)) for p in pixels.permute(0, 2, 3, 1).numpy()]
    return [p.resize((width * factor, height * factor), Image.Resampling.NEAREST) for p in pictures]


def wrap(text: str, font: Font, width: float) -> list[str]:
    """The lines of a text that are at most `width` pixels wide; a longer word stands on a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines


def _line_height(font: Font) -> int:
    box = font.getbbox("Ag")
    return ceil((box[3] - box[1]) * 1.35)


def sample_grid(
    images: Tensor,
    captions: Sequence[str] = (),
    columns: int = 0,
    title: str = "",
    max_lines: int = 4,
    font_size: int = 13,
) -> Image.Image:
    """A grid of pictures [B, 3, H, W] in [0, 1] with their captions below, row by row.

    Captions are wrapped to the pictures' width and cut after `max_lines` lines. `columns` 0 makes the grid
    about square.
    """
    pictures = to_pictures(images)
    if not pictures or (captions and len(captions) != len(pictures)):
        raise UserError(f"{len(pictures)} pictures and {len(captions)} captions make no grid")
    columns = min(len(pictures), columns or ceil(len(pictures) ** 0.5))
    font = ImageFont.load_default(font_size)
    width, height = pictures[0].size
    texts = [_cut(wrap(caption, font, width), max_lines, font, width) for caption in captions]
    head = _line_height(ImageFont.load_default(font_size + 3)) + GAP if title else 0
    tops, bottom = [], GAP + head
    for row in range(ceil(len(pictures) / columns)):
        tops.append(bottom)
        lines = max((len(text) for text in texts[row * columns : (row + 1) * columns]), default=0)
        bottom += height + (lines * _line_height(font) + GAP // 2 if lines else 0) + GAP
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), bottom), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP, GAP), title, INK, ImageFont.load_default(font_size + 3))
    for i, picture in enumerate(pictures):
        left, top = GAP + (i % columns) * (width + GAP), tops[i // columns]
        sheet.paste(picture, (left, top))
        for number, line in enumerate(texts[i] if texts else ()):
            draw.text((left, top + height + GAP // 2 + number * _line_height(font)), line, INK, font)
    return sheet


def _cut(lines: list[str], most: int, font: Font, width: float) -> list[str]:
    """The first lines; where some were left out, the last one ends in an ellipsis."""
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + "..."]


def reconstruction_grid(
    originals: Tensor, reconstructions: Tensor, labels: Sequence[str] = (), columns: int = 8
) -> Image.Image:
    """Originals above their reconstructions, both [B, 3, H, W] in [0, 1], in rows of `columns` pairs.

    A label, e.g. "24.1 dB", stands below each pair.
    """
    if originals.shape != reconstructions.shape or (labels and len(labels) != len(originals)):
        raise UserError(
            f"originals {list(originals.shape)}, reconstructions {list(reconstructions.shape)} and "
            f"{len(labels)} labels make no grid"
        )
    upper, lower = to_pictures(originals), to_pictures(reconstructions)
    font = ImageFont.load_default(13)
    words, side = ("original", "decoded"), 2
    margin = ceil(max(font.getlength(word) for word in words)) + 2 * GAP
    width, height = upper[0].size
    foot = _line_height(font) + GAP // 2 if labels else 0
    block = 2 * height + side + foot + GAP
    columns = min(columns, len(upper))
    size = (margin + columns * (width + GAP), GAP + ceil(len(upper) / columns) * block)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, pair in enumerate(zip(upper, lower, strict=True)):
        left, top = margin + (i % columns) * (width + GAP), GAP + (i // columns) * block
        for j, picture in enumerate(pair):
            sheet.paste(picture, (left, top + j * (height + side)))
            if i % columns == 0:
                middle = top + j * (height + side) + height // 2
                draw.text((margin - GAP, middle), words[j], INK, font, anchor="rm")
        if labels:
            draw.text((left + width // 2, top + 2 * height + side + GAP // 2), labels[i], INK, font, anchor="ma")
    return sheet
