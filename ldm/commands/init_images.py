"""The pictures that sampling begins from, and their masks: read, brought to size, and told where that changes them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.loading.fetch import as_images
from ldm.data.shards.picture import BadSample, Pixels, decode
from ldm.errors import UserError

SAME_RATIO = 0.01  # sides that differ by less are taken for rounded


@dataclass(frozen=True, eq=False)
class Source:
    """What an image is made from: the picture [3, H, W] in [-1, 1] and its mask [1, H, W] in [0, 1], if any.

    `notes` says in words what was done to bring them to size.
    """

    image: Tensor | None = None
    mask: Tensor | None = None
    notes: tuple[str, ...] = ()


def read_source(init_image: str | None, mask: str | None, size: tuple[int, int]) -> Source:
    """The picture and its mask at (height, width): just covering it, the rest cropped at the centre.

    White is masked. UserError where a file cannot be read, a mask comes without a picture, or their ratios differ.
    """
    if init_image is None:
        if mask is not None:
            raise UserError(f"mask={mask}: it says what of a picture is painted anew; give init_image=FILE too")
        return Source()
    pixels, original = _read("init_image", init_image, size)
    image, notes = as_images(pixels[None])[0], []
    if not _alike(original, size):
        notes.append(f"init_image={init_image}: {_words(original)} is cropped to the ratio of {_words(size)}")
    if mask is None:
        return Source(image, None, tuple(notes))
    hidden, masked = _read("mask", mask, size)
    if not _alike(masked, original):
        raise UserError(
            f"mask={mask} is {_words(masked)} (height x width), init_image={init_image} is {_words(original)}: "
            "their ratios differ; draw the mask on the picture"
        )
    if masked != original:
        notes.append(f"mask={mask}: {_words(masked)} is resized to the picture's {_words(original)}")
    values = torch.tensor(hidden, dtype=torch.float32).mean(dim=2)[None] / 255.0
    if masked != size:  # resampling swings by some hundredths beside an edge: what was black stays black
        values = ((values - 0.1) / 0.8).clamp(0.0, 1.0)
    return Source(image, values, tuple(notes))


def _read(knob: str, path: str, size: tuple[int, int]) -> tuple[Pixels, tuple[int, int]]:
    """Pixels [H, W, 3] of the wanted size, and the size (height, width) that the file has."""
    if not Path(path).is_file():
        raise UserError(f"{knob}={path}: there is no such file")
    try:
        pixels, original = decode(Path(path).read_bytes(), size)
    except BadSample as error:
        raise UserError(f"{knob}={path}: {error}; expected a whole PNG, JPEG or WebP file") from error
    top, left = (pixels.shape[0] - size[0]) // 2, (pixels.shape[1] - size[1]) // 2
    return pixels[top : top + size[0], left : left + size[1]], original


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _ratio(size: tuple[int, int]) -> float:
    return size[0] / size[1]


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return abs(_ratio(one) / _ratio(other) - 1.0) <= SAME_RATIO
