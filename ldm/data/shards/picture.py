"""Encoded pictures to pixels: decoding within bounds, transparency, orientation, resizing. Knows no torch."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # height, width

MAX_bytes = 64 << 20
MAX_pixels = 1 << 26
DRAFT = 2  # a JPEG is decoded at a reduced scale that is still this many times the wanted size
WHITE = (255, 255, 255)


class BadSample(Exception):
    """A sample that cannot be used; the text is the reason, one of a few."""


def _rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB, transparency on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layers = image.convert("RGBA")
        flat = Image.new("RGB", layers.size, WHITE)
        flat.paste(layers, mask=layers.getchannel("A"))
        return flat
    return image.convert("RGB")


def decode(data: bytes, size: Size) -> tuple[Pixels, Size]:
    """(pixels, original size) of an encoded picture, resized so that it just covers (height, width).

    A picture that already fits is not resampled; others by Lanczos, a much larger JPEG after decoding at a
    reduced scale. The orientation in EXIF is applied. Raises BadSample.
    """
    check_limits(data)
    try:
        image, original = _open(data, size)
        image.load()  # a cut file fails here
        image = _rgb(image)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound comes first
        raise BadSample("too many pixels") from error
    except Exception as error:  # Pillow raises many kinds for broken files
        raise BadSample("corrupt picture") from error
    return np.asarray(cover(image, size)), original


def check_limits(data: bytes, size: Size = (0, 0)) -> None:
    """Raises BadSample for bytes, or a stored size, out of bounds."""
    if not data:
        raise BadSample("empty picture")
    if len(data) > MAX_bytes:
        raise BadSample("too many bytes")
    if size[0] * size[1] > MAX_pixels:
        raise BadSample("too many pixels")


def _open(data: bytes, size: Size) -> tuple[Image.Image, Size]:
    """The picture upright, undecoded where nothing needs its pixels yet, and its (height, width) upright."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    original = (image.height, image.width)
    check_limits(data, original)
    if image.format in ("JPEG", "MPO"):
        side = DRAFT * max(size)
        image.draft(None, (side, side))
        if "exif" in image.info and (orientation := image.getexif().get(0x0112, 1)) != 1:
            image = ImageOps.exif_transpose(image)
            original = original[::-1] if orientation in (5, 6, 7, 8) else original
    return image, original


def cover_size(stored: Size, size: Size) -> Size:
    """The (height, width) at which a picture of the stored size just covers `size`."""
    scale = max(size[0] / stored[0], size[1] / stored[1])
    return max(size[0], round(stored[0] * scale)), max(size[1], round(stored[1] * scale))


def cover(image: Image.Image, size: Size) -> Image.Image:
    """The picture resized so that it just covers (height, width); the same object where it does already."""
    height, width = cover_size((image.height, image.width), size)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.LANCZOS)
