"""Sheets: each picture in its place, enlarged without smoothing, its words below."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from ldm.errors import UserError
from ldm.evaluation.contact_sheet import contact_sheet
from ldm.evaluation.grids import LINE, MARGIN, SIDE, labelled_grid, paired_grid, wrap


def flat(n: int, size: int = 16) -> torch.Tensor:
    """Pictures of one grey each, 0 to just below 1."""
    return (torch.arange(n) / n)[:, None, None, None].expand(n, 3, size, size)


def open_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_pictures_stand_row_by_row_and_large_enough(tmp_path: Path) -> None:
    labelled_grid(list(flat(5)), [""] * 5, tmp_path / "deep" / "grid.png", columns=3)
    pixels = open_pixels(tmp_path / "deep" / "grid.png")
    step = SIDE + MARGIN
    assert pixels.shape == (2 * step + MARGIN, 3 * step + MARGIN, 3)
    for i in range(5):
        at = pixels[MARGIN + i // 3 * step + SIDE // 2, MARGIN + i % 3 * step + SIDE // 2]
        assert at.tolist() == [round(255 * i / 5)] * 3
    assert pixels[MARGIN + step + 5, MARGIN + 2 * step + 5].tolist() == [255, 255, 255]


def test_enlarging_does_not_smooth(tmp_path: Path) -> None:
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    labelled_grid([board.expand(3, 16, 16).float()], [""], tmp_path / "board.png")
    pixels = open_pixels(tmp_path / "board.png")[MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert set(np.unique(pixels)) == {0, 255}
    large = torch.rand(3, 300, 300)
    labelled_grid([large], [""], tmp_path / "large.png")
    assert open_pixels(tmp_path / "large.png").shape == (300 + 2 * MARGIN, 300 + 2 * MARGIN, 3)


def test_a_row_is_as_high_as_its_longest_label(tmp_path: Path) -> None:
    long = "a rather large yellow triangle somewhere at the upper left of an old photograph"
    for labels, name in (([long, "a", "b", "c"], "one"), (["a", long, long, "c"], "both")):
        labelled_grid(list(flat(4)), labels, tmp_path / f"{name}.png", columns=2)
    one, both = (open_pixels(tmp_path / f"{name}.png") for name in ("one", "both"))
    lines = len(wrap(long, ImageFont.load_default(size=13), SIDE))
    assert lines > 2
    assert len(both) - len(one) == (lines - 1) * LINE
    words = one[MARGIN + SIDE : MARGIN + SIDE + lines * LINE, MARGIN : MARGIN + SIDE]
    assert words.min() < 120


def test_lines_fit_and_lose_no_letter() -> None:
    font = ImageFont.load_default(size=13)
    text = "a small yellow triangle at the upper left supercalifragilisticexpialidocious end"
    lines = wrap(text, font, 100, most=99)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 100 for line in lines)
    assert wrap("", font, 100) == []


def test_of_a_long_text_the_beginning_stays() -> None:
    font = ImageFont.load_default(size=13)
    text = "a caption from the web that goes on and on " * 9
    lines, cut = wrap(text, font, 100, most=99), wrap(text, font, 100, most=4)
    assert len(lines) > 9 and len(cut) == 4 and cut[:3] == lines[:3]
    assert cut[3].endswith("...") and lines[3].startswith(cut[3].removesuffix("..."))
    assert all(font.getlength(line) <= 100 for line in cut)


def test_pairs_stand_above_each_other(tmp_path: Path) -> None:
    originals = flat(3)
    paired_grid(originals, 1 - originals, tmp_path / "pairs.png", columns=2)
    pixels = open_pixels(tmp_path / "pairs.png")
    x, y = pixels.shape[1] - MARGIN - SIDE // 2, MARGIN + SIDE // 2
    assert pixels[y, x].tolist() == [85] * 3
    assert pixels[y + SIDE + 2, x].tolist() == [170] * 3


def test_what_does_not_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 images and 1 labels"):
        labelled_grid(list(flat(2)), ["a"], tmp_path / "x.png")
    with pytest.raises(UserError, match="0 images"):
        labelled_grid([], [], tmp_path / "x.png")
    with pytest.raises(UserError, match="make no pairs"):
        paired_grid(flat(2), flat(3), tmp_path / "x.png")


def test_pictures_of_different_sizes_stand_side_by_side(tmp_path: Path) -> None:
    wide, high = torch.zeros(3, 144, 288), torch.full((3, 200, 144), 0.5)
    labelled_grid([high, wide, high], [""] * 3, tmp_path / "mixed.png", columns=2)
    pixels = open_pixels(tmp_path / "mixed.png")
    assert pixels.shape[:2] == (2 * (200 + MARGIN) + MARGIN, 2 * (288 + MARGIN) + MARGIN)
    assert (pixels[:, :, 0] == 0).sum() == 144 * 288
    assert (pixels[:, :, 0] == 128).sum() == 2 * 200 * 144


def test_a_contact_sheet_has_a_place_for_every_cell(tmp_path: Path) -> None:
    cells = {(i, j, k): [torch.full((3, 144, 144), 20 * (1 + i + 2 * j + 4 * k) / 255)] * n
             for i, n in ((0, 1), (1, 3)) for j in range(2) for k in range(2)}  # fmt: skip
    contact_sheet(cells, ["steps 1", "steps 2"], ["eta 0", "eta 1"], ["first", "second"], tmp_path / "sheet.png")
    pixels = open_pixels(tmp_path / "sheet.png")[:, :, 0]
    for (i, j, k), images in cells.items():
        rows = np.nonzero(pixels == 20 * (1 + i + 2 * j + 4 * k))[0]
        assert abs(len(rows) - len(images) * 144 * 144) < 100  # letters have greys too
        assert (np.median(rows) > len(pixels) / 2) == bool(k)
    left = [np.median(np.nonzero(pixels == 20 * (1 + 2 * j))[0]) for j in range(2)]
    assert left[0] < left[1]
    with pytest.raises(UserError, match="lacks pictures"):
        contact_sheet({(0, 0, 0): cells[0, 0, 0]}, ["a", "b"], [""], [""], tmp_path / "none.png")


def test_an_axis_that_is_not_there_takes_no_place(tmp_path: Path) -> None:
    contact_sheet({(0, 0, 0): [torch.zeros(3, 144, 144)]}, [""], [""], [""], tmp_path / "one.png")
    pixels = open_pixels(tmp_path / "one.png")
    assert pixels.shape == (144 + 3 * MARGIN, 144 + 2 * MARGIN, 3)
