"""A sample from its place in a shard: bytes, picture, crop, caption. Stateless.

What is random (crop, flip, the substitute of a bad sample) is drawn from (seed, epoch, index).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.index import Manifest
from ldm.data.picture import BadSample, MAX_bytes, Pixels, decode
from ldm.data.shards import OpenShards
from ldm.data.tar import JSON_CAPTION, NO_CAPTION
from ldm.errors import UserError
from ldm.randomness import key

TRIES = 8


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

    pixels: Pixels  # [H, W, 3]; [H, W, 0] of latents made beforehand
    caption: str
    index: int
    original_size: tuple[int, int]  # (height, width) as stored
    crop: tuple[int, int]  # (top, left) in the resized picture
    moments: NDArray[np.float16] | None = None  # [2, C, h, w], of latents made beforehand
    texts: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # of captions encoded beforehand, by name

    @property
    def image(self) -> Tensor:
        """[3, H, W] float32 in [-1, 1]."""
        return as_images(self.pixels[None])[0]


def as_images(pixels: Pixels) -> Tensor:
    """Images [B, 3, H, W] float32 in [-1, 1] of pixels [B, H, W, 3]."""
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return images.to(torch.float32).div_(127.5).sub_(1.0)


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

    def pictures(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The pictures as tensors of a Batch, by field."""
        return {"images": as_images(np.stack([sample.pixels for sample in samples]))}

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
        """A sample's caption; BadSample where it has none and needs one."""
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

    def parts(self, index: int) -> dict[str, bytes]:
        """A sample's stored text and JSON, those of "txt" and "json" that it has."""
        columns = self.manifest
        places = {
            "txt": (int(columns.text_offset[index]), int(columns.text_size[index])),
            "json": (int(columns.json_offset[index]), int(columns.json_size[index])),
        }
        return {kind: self._read(index, *place) for kind, place in places.items() if place[1] >= 0}

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
