"""A sample from its place in a shard: bytes, picture, crop, caption. Stateless.

What is random (crop, flip, the substitute of a bad sample) is drawn from (seed, epoch, index).
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ldm.data.index import Manifest
from ldm.data.shards import OpenShards
from ldm.data.tar import JSON_CAPTION, NO_CAPTION
from ldm.errors import UserError
from ldm.randomness import key

Pixels = NDArray[np.uint8]

MAX_bytes = 64 << 20
MAX_pixels = 1 << 26
TRIES = 8
DRAFT = 2  # a JPEG is decoded at a reduced scale that is still this many times the wanted size
WHITE = (255, 255, 255)


class BadSample(Exception):  # noqa: N818 - an event, not an error
    """A sample that cannot be used; the text is the reason, one of a few."""


@dataclass(frozen=True, slots=True)
class View:
    """How a picture becomes the training image.

    The shorter side is resized to `size` (an int, or (height, width): the picture then covers that box), the
    rest is cropped at the centre, or anywhere with `random_crop`. `flip` mirrors half of the samples.
    """

    size: tuple[int, int]
    random_crop: bool = False
    flip: bool = False

    @staticmethod
    def of(size: int | Sequence[int], random_crop: bool = False, flip: bool = False) -> "View":
        """The view for a side or a (height, width). Raises UserError for anything else."""
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise UserError(f"size must be a number of pixels or [height, width], got {size}")
        return View((sides[0], sides[1]), random_crop, flip)


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture of the wanted size with its caption."""

    pixels: Pixels  # [H, W, 3]
    caption: str
    index: int
    original_size: tuple[int, int]  # (height, width) as stored
    crop: tuple[int, int]  # (top, left) in the resized picture

    @property
    def image(self) -> Tensor:
        """[3, H, W] float32 in [-1, 1]."""
        return as_images(self.pixels[None])[0]


def as_images(pixels: Pixels) -> Tensor:
    """Images [B, 3, H, W] float32 in [-1, 1] of pixels [B, H, W, 3]."""
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return images.to(torch.float32).div_(127.5).sub_(1.0)


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


def decode(data: bytes, size: tuple[int, int]) -> tuple[Pixels, tuple[int, int]]:
    """(pixels, original size) of an encoded picture, resized so that it just covers (height, width).

    A picture that already fits is not resampled; others by Lanczos, a much larger JPEG after decoding at a
    reduced scale. The orientation in EXIF is applied. Raises BadSample.
    """
    if not data:
        raise BadSample("empty picture")
    try:
        image, original = _open(data, size)
        image = _rgb(image)
    except BadSample:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files
        raise BadSample("corrupt picture") from error
    return np.asarray(cover(image, size)), original


def _open(data: bytes, size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """The picture upright, undecoded where nothing needs its pixels yet, and its (height, width) upright."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    original = (image.height, image.width)
    if original[0] * original[1] > MAX_pixels:
        raise BadSample("too many pixels")
    if image.format in ("JPEG", "MPO"):
        side = DRAFT * max(size)
        image.draft(None, (side, side))
        if "exif" in image.info and (orientation := image.getexif().get(0x0112, 1)) != 1:
            image = ImageOps.exif_transpose(image)
            original = original[::-1] if orientation in (5, 6, 7, 8) else original
    return image, original


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture resized so that it just covers (height, width); the same object where it does already."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    fitted = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image if fitted == image.size else image.resize(fitted, Image.Resampling.LANCZOS)


@dataclass
class _Cache:
    """Decoded, resized, uncropped samples by index, up to a number of bytes; what is in stays in."""

    limit_bytes: int
    held: dict[int, tuple[Pixels, str, tuple[int, int]]] = field(default_factory=dict)
    held_bytes: int = 0

    def add(self, index: int, loaded: tuple[Pixels, str, tuple[int, int]]) -> None:
        if self.held_bytes + loaded[0].nbytes <= self.limit_bytes:
            self.held[index] = loaded
            self.held_bytes += loaded[0].nbytes


class Fetcher:
    """Samples of a manifest, by index and epoch.

    Keeps open files and, up to `cache_bytes`, decoded pictures; neither changes what comes out. With
    `require_caption` false a sample without caption has the empty one, else it is bad.
    """

    def __init__(
        self,
        manifest: Manifest,
        view: View,
        seed: int = 0,
        require_caption: bool = True,
        cache_bytes: int = 0,
    ) -> None:
        self.manifest = manifest
        self.view = view
        self.seed = seed
        self.require_caption = require_caption
        self._cache = _Cache(cache_bytes)
        self._shards = OpenShards(manifest.paths)
        self._current: set[int] = set()

    def __call__(self, index: int, epoch: int = 0) -> Sample:
        """The sample. Raises BadSample; UserError where its shard changed since it was indexed."""
        loaded = self._cache.held.get(index)
        if loaded is None:
            loaded = self._load(index)
            self._cache.add(index, loaded)
        pixels, caption, original = loaded
        (height, width), view = pixels.shape[:2], self.view
        spare = (height - view.size[0], width - view.size[1])
        top, left = spare[0] // 2, spare[1] // 2
        if view.random_crop and any(spare):
            draw = key(self.seed, "crop", epoch, index)
            top, left = (draw & 0xFFFFFFFF) % (spare[0] + 1), (draw >> 32 & 0xFFFFFFFF) % (spare[1] + 1)
        pixels = pixels[top : top + view.size[0], left : left + view.size[1]]
        if view.flip and key(self.seed, "flip", epoch, index) & 1:
            pixels = pixels[:, ::-1]
        return Sample(pixels, caption, index, original, (top, left))

    def good(self, index: int, epoch: int = 0) -> tuple[Sample, list[tuple[int, str]]]:
        """The sample or, where it is bad, its substitute; and (index, reason) of each that was bad.

        The substitutes are drawn from (seed, epoch, index). Raises UserError after a few in a row.
        """
        bad: list[tuple[int, str]] = []
        wanted = index
        while len(bad) < TRIES:
            try:
                return self(index, epoch), bad
            except BadSample as reason:
                bad.append((index, str(reason)))
                index = key(self.seed, "substitute", epoch, wanted, len(bad)) % len(self.manifest)
        told = "\n".join(f"  {self.manifest.key(i)} in {self.manifest.shard_of(i)}: {why}" for i, why in bad)
        raise UserError(f"{TRIES} samples in a row cannot be used:\n{told}\nlook at these shards")

    def _load(self, index: int) -> tuple[Pixels, str, tuple[int, int]]:
        """(resized picture, caption, original size)."""
        columns = self.manifest
        if columns.image_size[index] > MAX_bytes:
            raise BadSample("too many bytes")
        caption = self.caption(index)
        data = self._read(index, int(columns.image_offset[index]), int(columns.image_size[index]))
        pixels, original = decode(data, self.view.size)
        return pixels, caption, original

    def caption(self, index: int) -> str:
        columns = self.manifest
        kind = columns.caption[index]
        if kind == NO_CAPTION:
            if self.require_caption:
                raise BadSample("no caption")
            return ""
        if kind == JSON_CAPTION:
            data = self._read(index, int(columns.json_offset[index]), int(columns.json_size[index]))
            return str(json.loads(data)["caption"]).strip()
        data = self._read(index, int(columns.text_offset[index]), int(columns.text_size[index]))
        return data.decode("utf-8", "replace").strip()

    def _read(self, index: int, offset: int, size: int) -> bytes:
        number = int(self.manifest.shard[index])
        shard = self._shards[number]
        if number not in self._current:
            facts = self.manifest.shards[number]
            if (shard.size, shard.mtime_ns) != (facts["bytes"], facts["mtime_ns"]):
                raise UserError(f"{shard.path} changed after it was indexed; start again")
            self._current.add(number)
        return shard.read(offset, size)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": _Cache(self._cache.limit_bytes), "_current": set()}
