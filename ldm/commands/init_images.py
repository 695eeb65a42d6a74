"""The pictures that sampling starts from and their masks, read and brought to size."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.shards.picture import BadSample, Pixels, decode
from ldm.errors import UserError

SAME_RATIO = 0.01  # relative; a smaller difference comes from rounding the sides


@dataclass(frozen=True, eq=False)
class InitImage:
    """The picture [3, H, W] in [-1, 1] and the mask [1, H, W] in [0, 1] of one image to make, None where not given.

    `notes` says what was done to bring them to size.
    """

    image: Tensor | None = None
    mask: Tensor | None = None
    notes: tuple[str, ...] = ()


def read_init_image(init_image: str | None, mask: str | None, size: tuple[int, int]) -> InitImage:
    """The picture and its mask at (height, width): just covering it, the rest cropped at the centre.

    White is painted. UserError where a file cannot be read, a mask comes without a picture, or their ratios differ.
    """
    if init_image is None:
        if mask is not None:
            raise UserError(f"mask={mask}: it says which part of a picture is painted; give init_image=FILE too")
        return InitImage()
    pixels, image_size = _read("init_image", init_image, size)
    image, notes = torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1.0, []  # [3, H, W]
    if not _same_ratio(image_size, size):
        notes.append(f"init_image={init_image}: {_words(image_size)} is cropped to the ratio of {_words(size)}")
    if mask is None:
        return InitImage(image, None, tuple(notes))
    pixels, mask_size = _read("mask", mask, size)
    if not _same_ratio(mask_size, image_size):
        raise UserError(
            f"mask={mask} is {_words(mask_size)} (height x width), init_image={init_image} is {_words(image_size)}: "
            "their ratios differ; draw the mask on the picture"
        )
    if mask_size != image_size:
        notes.append(f"mask={mask}: {_words(mask_size)} is resized to the picture's {_words(image_size)}")
    values = torch.tensor(pixels, dtype=torch.float32).mean(dim=2)[None] / 255.0  # [1, H, W]
    if mask_size != size:  # resampling overshoots by some hundredths at an edge: what was black stays black
        values = ((values - 0.1) / 0.8).clamp(0.0, 1.0)
    return InitImage(image, values, tuple(notes))


def _read(knob: str, path: str, size: tuple[int, int]) -> tuple[Pixels, tuple[int, int]]:
    """Pixels [H, W, 3] of the wanted size, and the size (height, width) that the file has."""
    if not Path(path).is_file():
        raise UserError(f"{knob}={path}: there is no such file")
    try:
        pixels, file_size = decode(Path(path).read_bytes(), size)
    except BadSample as error:
        raise UserError(f"{knob}={path}: {error}; expected a whole PNG, JPEG or WebP file") from error
    top, left = (pixels.shape[0] - size[0]) // 2, (pixels.shape[1] - size[1]) // 2
    return pixels[top : top + size[0], left : left + size[1]], file_size


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _same_ratio(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return abs(one[0] * other[1] / (one[1] * other[0]) - 1.0) <= SAME_RATIO
