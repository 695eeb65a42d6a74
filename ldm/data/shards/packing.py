"""How pictures are stored when they are packed into shards, and what a sample to pack is."""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps

from ldm.data.shards.picture import cover
from ldm.errors import UserError

ORIENTATION = 0x0112  # EXIF's tag
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class Packing:
    """How pictures are stored.

    size           a longer shorter side is reduced to this many pixels; None keeps the size
    background     colour behind transparent pixels; None keeps them transparent
    format         jpg (quality 95), png or webp (lossless); None keeps the picture's own
    shard_samples  of each shard; the last one has fewer; None: 1000, or what shard_bytes allows
    shard_bytes    limit of a shard's samples, with their pictures as the source has them
    val_fraction   share of the samples, chosen by their keys, that goes to OUT/val
    """

    size: int | None = None
    background: str | None = None
    format: str | None = None
    shard_samples: int | None = None
    shard_bytes: int | None = None
    val_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"format must be one of {', '.join(FORMATS)}, got {self.format}")
        for name in ("shard_samples", "shard_bytes", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', '-')} must be at least 1, got {value}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val-fraction must be in [0, 1), got {self.val_fraction}")
        if self.background is not None:
            try:
                Image.new("RGB", (1, 1), self.background)
            except ValueError as error:
                raise UserError(f"{self.background} is not a colour; give a name or #rrggbb") from error

    @property
    def keeps_pictures(self) -> bool:
        """Whether every picture is stored in the bytes that it has."""
        return self.size is None and self.background is None and self.format is None

    def encode(self, data: bytes) -> tuple[bytes, str, dict[str, Any]]:
        """(bytes, extension, facts for the JSON) of a picture as it is stored.

        The facts are width and height of the upright picture, and sha256 of the stored bytes. Raises OSError or
        ValueError where the picture cannot be read.
        """
        image: Image.Image = Image.open(BytesIO(data), formats=tuple(FORMATS.values()))
        kind = "jpg" if image.format == "MPO" else next(k for k, name in FORMATS.items() if name == image.format)
        image.load()  # a cut file fails here, not in training
        upright = image
        if kind == "jpg" and image.getexif().get(ORIENTATION, 1) != 1:
            upright = ImageOps.exif_transpose(image)
        changed = self._convert(upright)
        if changed is not upright or self.format not in (None, kind):
            kind = self.format or kind
            data = _save(changed, kind)
        width, height = changed.size
        return data, kind, {"width": width, "height": height, "sha256": hashlib.sha256(data).hexdigest()}

    def _convert(self, image: Image.Image) -> Image.Image:
        """The picture on its background and within its size; the same object where nothing changes."""
        original = image
        transparent = "A" in image.getbands() or "transparency" in image.info
        if self.background is not None and transparent:
            layers = image.convert("RGBA")
            image = Image.new("RGB", layers.size, self.background)
            image.paste(layers, mask=layers.getchannel("A"))
        if self.size is not None and min(image.size) > self.size:
            if image.mode not in ("RGB", "RGBA", "L", "LA"):
                image = image.convert("RGBA" if transparent else "RGB")
            image = cover(image, (self.size, self.size))
        if image is not original or self.format is None or image.mode in ("RGB", "RGBA", "L"):
            return image
        return image.convert("RGBA" if transparent else "RGB")


def _save(image: Image.Image, kind: str) -> bytes:
    data = BytesIO()
    if kind == "jpg":
        image.convert("RGB").save(data, "JPEG", quality=95, subsampling=0)
    elif kind == "webp":
        image.save(data, "WEBP", lossless=True, quality=30, method=1)
    else:
        image.save(data, "PNG", optimize=False)
    return data.getvalue()


@dataclass(frozen=True)
class Packable(ABC):
    """A sample to pack: the `path` of the file that it is read from, its `key` in the shard.

    `renamed`: the source has it under another key, which several shards have.
    """

    path: str
    key: str
    renamed: bool = False

    @property
    @abstractmethod
    def tar_bytes(self) -> int:
        """The bytes it takes in a shard with its picture unchanged, or a little less."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """What distinguishes it from other samples, for JSON."""

    @abstractmethod
    def parts(self, packing: Packing) -> dict[str, bytes]:
        """Its members by extension. Raises OSError or ValueError where the picture cannot be read."""


def as_json(facts: dict[str, Any]) -> bytes:
    """The same bytes for the same facts; what JSON does not know (dates, decimals) becomes text."""
    return json.dumps(facts, ensure_ascii=False, sort_keys=True, default=str).encode()


def member_bytes(name: str, size: int) -> int:
    """The bytes that a member of `size` bytes takes in a tar file, header and padding included."""
    extended = 0 if len(name.encode()) < 90 and name.isascii() else 1024 + -(-len(name.encode()) // 512) * 512
    return extended + 512 + -(-size // 512) * 512
