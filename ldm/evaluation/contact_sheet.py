"""Contact sheets: pictures over two or three knobs, as columns, rows and panels with their labels."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.grids import FONT_SIZE, INK, LINE, MARGIN, Font, save_sheet, tile, wrap

LEFT = 120  # pixels at most for the labels of the rows
GAP = 2  # pixels between the pictures of a cell

Cell = tuple[int, int, int]
"""(column, row, panel)."""


def contact_sheet(
    cells: Mapping[Cell, Sequence[Tensor]],
    columns: Sequence[str],
    rows: Sequence[str],
    panels: Sequence[str],
    path: Path,
) -> None:
    """Writes a PNG of the cells' pictures [3, H, W] in [0, 1], panel below panel, each with its rows and columns.

    A cell's pictures stand close together; an empty label takes no place. UserError where a cell is missing.
    """
    every = [(i, j, k) for k in range(len(panels)) for j in range(len(rows)) for i in range(len(columns))]
    lacking = [cell for cell in every if not cells.get(cell)]
    if lacking:
        raise UserError(f"a contact sheet of {len(every)} cells lacks pictures for {lacking[:3]}")
    blocks = {cell: _block(cells[cell]) for cell in every}
    width, height = (max(block.size[side] for block in blocks.values()) for side in (0, 1))
    font, bold = ImageFont.load_default(size=FONT_SIZE), ImageFont.load_default(size=FONT_SIZE + 4)
    left = _left(rows, font)
    heads = [wrap(label, font, width) for label in columns]
    head = max(len(lines) for lines in heads) * LINE
    title = LINE + MARGIN if any(panels) else 0
    panel = title + head + len(rows) * (height + MARGIN) + MARGIN
    total = (left + len(columns) * (width + MARGIN), MARGIN + len(panels) * panel)
    sheet = Image.new("RGB", total, "white")
    draw = ImageDraw.Draw(sheet)
    for k, name in enumerate(panels):
        top = MARGIN + k * panel
        draw.text((MARGIN, top), name, fill=INK, font=bold)
        for i, lines in enumerate(heads):
            x = left + i * (width + MARGIN) + width // 2
            for number, line in enumerate(lines):
                draw.text((x, top + title + number * LINE), line, fill=INK, font=font, anchor="ma")
        for j, label in enumerate(rows):
            y = top + title + head + j * (height + MARGIN)
            for number, line in enumerate(wrap(label, font, LEFT)):
                draw.text((left - MARGIN, y + height // 2 + number * LINE), line, fill=INK, font=font, anchor="rm")
            for i in range(len(columns)):
                sheet.paste(blocks[i, j, k], (left + i * (width + MARGIN), y))
    save_sheet(sheet, path)


def _left(rows: Sequence[str], font: Font) -> int:
    """The width, in pixels, of what stands to the left of the pictures."""
    longest = max((font.getlength(line) for label in rows for line in wrap(label, font, LEFT)), default=0.0)
    return ceil(longest) + (2 * MARGIN if longest else MARGIN)


def _block(images: Sequence[Tensor]) -> Image.Image:
    """A cell's pictures as one, nearly square."""
    tiles = [tile(image) for image in images]
    columns = ceil(len(tiles) ** 0.5)
    width, height = tiles[0].size
    size = (columns * (width + GAP) - GAP, ceil(len(tiles) / columns) * (height + GAP) - GAP)
    block = Image.new("RGB", size, "white")
    for place, picture in enumerate(tiles):
        block.paste(picture, (place % columns * (width + GAP), place // columns * (height + GAP)))
    return block
