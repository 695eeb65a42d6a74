"""Decoders: encoded pictures to pixels that just cover a size, by one of a few methods with names.

`exact` and `fast` read JPEGs with libjpeg-turbo (simplejpeg) and resize with torch's antialiased bicubic filter on
bytes; `lanczos` is Pillow. What is no plain JPEG, and what is not a three-channel or grey one, goes through
Pillow's Lanczos in all of them. A process may decode in several threads: none of these holds the interpreter.
"""

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from PIL import Image

from ldm.data.shards.picture import BadSample, Pixels, checked, decode
from ldm.errors import UserError, nearest

Size = tuple[int, int]  # height, width
Decode = Callable[[bytes, Size], tuple[Pixels, Size]]
"""(pixels [H, W, 3] that just cover a size, the stored picture's own size upright) of encoded bytes, or BadSample."""

TURNS: dict[int, Callable[[Pixels], Pixels]] = {  # EXIF's orientation: how the stored picture becomes upright
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: p.transpose(1, 0, 2)[::-1],
}


def exact(data: bytes, size: Size) -> tuple[Pixels, Size]:
    """Decodes JPEGs whole."""
    return _turbo(data, size, reduce=False)


def fast(data: bytes, size: Size) -> tuple[Pixels, Size]:
    """Decodes JPEGs at the smallest scale, in eighths, that still covers the size (in the DCT's own domain)."""
    return _turbo(data, size, reduce=True)


DECODERS: dict[str, Decode] = {"exact": exact, "fast": fast, "lanczos": decode}


def decoder(name: str) -> Decode:
    """The decoder of a name. Raises UserError, with the nearest, for one that there is not."""
    if name not in DECODERS:
        raise UserError(f"decode={name}: there is no such way to decode; {nearest(name, DECODERS)}")
    return DECODERS[name]


def _turbo(data: bytes, size: Size, reduce: bool) -> tuple[Pixels, Size]:
    checked(data)
    if data[:2] != b"\xff\xd8":
        return decode(data, size)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "MPO")) as header:  # reads the header alone
            stored, plain = (header.height, header.width), header.mode in ("RGB", "L")
            turn = header.getexif().get(0x0112, 1) if "exif" in header.info else 1
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels") from error
    except Exception as error:  # Pillow raises many kinds for broken files
        raise BadSample("corrupt picture") from error
    if not plain:
        return decode(data, size)
    checked(data, stored)
    sideways = turn in (5, 6, 7, 8)
    height, width = cover_size(stored, size[::-1] if sideways else size)
    least = {"min_height": height, "min_width": width} if reduce and height <= stored[0] else {}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", **least)  # [h, w, 3]; a cut file is an error
    except ValueError as error:
        raise BadSample("corrupt picture") from error
    upright = TURNS.get(turn, TURNS[1])(resize(pixels, (height, width)))
    return upright, (stored[::-1] if sideways else stored)


def cover_size(stored: Size, size: Size) -> Size:
    """The (height, width) at which a picture of the stored size just covers `size`."""
    scale = max(size[0] / stored[0], size[1] / stored[1])
    return max(size[0], round(stored[0] * scale)), max(size[1], round(stored[1] * scale))


def resize(pixels: Pixels, size: Size) -> Pixels:
    """Pixels [*size, 3] by torch's antialiased bicubic filter (a = -0.5) on bytes; the same array where they fit."""
    if pixels.shape[:2] == size:
        return pixels
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # [1, 3, h, w], channels last
    resized = torch.nn.functional.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
    found: Pixels = np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
    return found
