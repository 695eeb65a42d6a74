"""A sample from its place in a shard: bytes, picture, crop, caption. Stateless.

What is random (crop, flip, caption, the substitute of a bad sample) is drawn from (seed, epoch, index).
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.loading.caption_choice import CaptionChoice
from ldm.data.loading.decode import Decode
from ldm.data.order.selection import Selection
from ldm.data.shards.index import Manifest
from ldm.data.shards.picture import BadSample, MAX_bytes, Pixels, decode
from ldm.data.shards.shards import OpenShards
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
    crop: tuple[int, int]  # (top, left) in the resized picture, mirrored where the sample is
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
    """Decoded, resized, uncropped pictures by index and size, up to a number of bytes; what is in stays in."""

    limit_bytes: int
    held: dict[tuple[int, tuple[int, int]], tuple[Pixels, tuple[int, int]]] = field(default_factory=dict)
    held_bytes: int = 0

    def add(self, name: tuple[int, tuple[int, int]], loaded: tuple[Pixels, tuple[int, int]]) -> None:
        if self.held_bytes + loaded[0].nbytes <= self.limit_bytes:
            self.held[name] = loaded
            self.held_bytes += loaded[0].nbytes


class Fetcher:
    """Samples of a manifest, by index and epoch. Several threads may ask at once.

    Keeps open files and, up to `cache_bytes`, decoded pictures; neither changes what comes out. `decode` is one of the
    DECODERS, `captions` tells which caption a visit has, `chosen` are the samples that are used.
    """

    def __init__(
        self,
        manifest: Manifest,
        view: View,
        seed: int = 0,
        cache_bytes: int = 0,
        decode: Decode = decode,
        captions: CaptionChoice | None = None,
        chosen: Selection | None = None,
    ) -> None:
        self.manifest = manifest
        self.view = view
        self.seed = seed
        self.decode = decode
        self.captions = captions or CaptionChoice()
        self.chosen = chosen or Selection([len(manifest)])
        self._cache = _Cache(cache_bytes)
        self._own = _Own()

    def __call__(self, index: int, epoch: int = 0, size: tuple[int, int] | None = None) -> Sample:
        """The sample, at another (height, width) than the view's where one is given.

        Raises BadSample; UserError where its shard changed since it was indexed.
        """
        size = size or self.view.size
        caption = self.caption(index, epoch)
        loaded = self._cache.held.get((index, size))
        if loaded is None:
            loaded = self._load(index, size)
            self._cache.add((index, size), loaded)
        pixels, original = loaded
        (height, width), view = pixels.shape[:2], self.view
        spare = (height - size[0], width - size[1])
        top, left = spare[0] // 2, spare[1] // 2
        if view.random_crop and any(spare):
            draw = key(self.seed, "crop", epoch, index)
            top, left = (draw & 0xFFFFFFFF) % (spare[0] + 1), (draw >> 32 & 0xFFFFFFFF) % (spare[1] + 1)
        pixels = pixels[top : top + size[0], left : left + size[1]]
        if view.flip and key(self.seed, "flip", epoch, index) & 1:
            pixels, left = pixels[:, ::-1], spare[1] - left  # the same crop of the mirrored picture
        return Sample(pixels, caption, index, original, (top, left))

    def picture(self, sample: Sample) -> dict[str, NDArray[Any]]:
        """What a sample adds to the pictures of a Batch, by field."""
        return {"images": sample.image.numpy()}

    def fetch_or_substitute(
        self,
        index: int,
        epoch: int = 0,
        size: tuple[int, int] | None = None,
        places: range | None = None,
    ) -> tuple[Sample, list[tuple[int, str]]]:
        """The sample or, where it is bad, its substitute; and (index, reason) of each that was bad.

        The substitutes are drawn from (seed, epoch, index), among those at `places` of the chosen samples (None: all).
        Only what is bad for good has one; other errors pass through. Raises UserError after a few in a row.
        """
        bad: list[tuple[int, str]] = []
        wanted = index
        places = places or range(len(self.chosen))
        while len(bad) < TRIES:
            try:
                return self(index, epoch, size), bad
            except BadSample as reason:
                bad.append((index, str(reason)))
                index = self.chosen[places[key(self.seed, "substitute", epoch, wanted, len(bad)) % len(places)]]
        told = "\n".join(f"  {self.manifest.key(i)} in {self.manifest.shard_of(i)}: {why}" for i, why in bad)
        raise UserError(f"{TRIES} samples in a row cannot be used:\n{told}\nlook at these shards")

    def _load(self, index: int, size: tuple[int, int]) -> tuple[Pixels, tuple[int, int]]:
        """(resized picture, original size)."""
        columns = self.manifest
        if columns.image_size[index] > MAX_bytes:
            raise BadSample("too many bytes")
        data = self._read(index, int(columns.image_offset[index]), int(columns.image_size[index]))
        return self.decode(data, size)

    def check_captions(self) -> None:
        """Raises UserError where the captions ask for a field that the samples do not have."""
        self.captions.check(self.manifest, self._read)

    def caption(self, index: int, epoch: int = 0) -> str:
        """A sample's caption at a visit; BadSample where it has none and needs one."""
        return self.captions(self.manifest, self._read, index, self.seed, epoch)

    def alternatives(self, index: int) -> list[str]:
        """All captions that a visit of a sample may have; BadSample where it has none and needs one."""
        return self.captions.alternatives(self.manifest, self._read, index)

    def parts(self, index: int) -> dict[str, bytes]:
        """A sample's stored text and JSON, those of "txt" and "json" that it has."""
        columns = self.manifest
        places = {
            "txt": (int(columns.text_offset[index]), int(columns.text_size[index])),
            "json": (int(columns.json_offset[index]), int(columns.json_size[index])),
        }
        return {kind: self._read(index, *place) for kind, place in places.items() if place[1] >= 0}

    def _read(self, index: int, offset: int, size: int) -> bytes:
        """A range of the shard that holds a sample. Raises UserError where the shard is not the one indexed."""
        number = int(self.manifest.shard[index])
        shards = self._own.shards(self.manifest)
        shard = shards[number]
        if number not in self._own.current:
            facts = self.manifest.shards[number]
            if (shard.size, shard.mtime_ns) != (facts["bytes"], facts["mtime_ns"]):
                raise UserError(f"{shard.path} changed after it was indexed; start again")
            self._own.current.add(number)
        data = shard.read(offset, size)
        if len(data) < size:
            raise UserError(
                f"{shard.path} ends before byte {offset + size}, it changed after it was indexed; start again"
            )
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": _Cache(self._cache.limit_bytes), "_own": _Own()}


class _Own(threading.local):
    """A thread's own open shards, and those of them that it has compared with the index."""

    def __init__(self) -> None:
        self._shards: OpenShards | None = None
        self.current: set[int] = set()

    def shards(self, manifest: Manifest) -> OpenShards:
        if self._shards is None:
            self._shards = manifest.open_shards()
        return self._shards

    def __reduce__(self) -> tuple[type["_Own"], tuple[()]]:
        return _Own, ()
