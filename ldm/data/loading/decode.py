"""Decoders: encoded pictures to pixels that just cover a size, by one of a few named methods.

`exact` and `fast` read JPEGs with libjpeg-turbo (simplejpeg) and resize with torch's antialiased bicubic filter on
bytes; `lanczos` is Pillow. All of them read other files than JPEGs, and JPEGs that are neither RGB nor grey, by
Pillow and resize them by Lanczos. A process may decode in several threads: none of these holds the interpreter.
"""

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from PIL import Image

from ldm.data.shards.picture import BadSample, Pixels, Size, check_limits, cover_size, decode
from ldm.errors import UserError, nearest

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
    """The decoder of a name. Raises UserError, with the nearest names, for an unknown one."""
    if name not in DECODERS:
        raise UserError(f"decode={name}: there is no such decoder; {nearest(name, DECODERS)}")
    return DECODERS[name]


def _turbo(data: bytes, size: Size, reduce: bool) -> tuple[Pixels, Size]:
    check_limits(data)
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
    check_limits(data, stored)
    sideways = turn in (5, 6, 7, 8)
    height, width = cover_size(stored, size[::-1] if sideways else size)
    least = {"min_height": height, "min_width": width} if reduce and height <= stored[0] else {}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", **least)  # [h, w, 3]; a cut file is an error
    except ValueError as error:
        raise BadSample("corrupt picture") from error
    upright = TURNS.get(turn, TURNS[1])(resize(pixels, (height, width)))
    return upright, (stored[::-1] if sideways else stored)


def resize(pixels: Pixels, size: Size) -> Pixels:
    """Pixels [*size, 3] by torch's antialiased bicubic filter (a = -0.5) on bytes; the same array where they fit."""
    if pixels.shape[:2] == size:
        return pixels
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # [1, 3, h, w], channels last
    resized = torch.nn.functional.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
    covering: Pixels = np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
    return covering
