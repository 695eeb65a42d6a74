"""A sample from its place in a shard: bytes, picture, crop, caption. Stateless.

What is random (crop, flip, caption, the substitute of a bad sample) is drawn from (seed, epoch, index).
"""

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
from ldm.data.shards.picture import BadSample, MAX_bytes, Pixels, Size, decode
from ldm.errors import UserError
from ldm.randomness import key

TRIES = 8


@dataclass(frozen=True, slots=True)
class View:
    """How a picture becomes the training image.

    The shorter side is resized to `size` (an int, or (height, width): the picture then covers that box), the
    rest is cropped at the centre, or anywhere with `random_crop`. `flip` mirrors half of the samples.
    """

    size: Size
    random_crop: bool = False
    flip: bool = False

    @staticmethod
    def of(size: int | Sequence[int], random_crop: bool = False, flip: bool = False) -> "View":
        """The view for a side or a (height, width). Raises UserError for anything else."""
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise UserError(f"size must be a number of pixels or [height, width], got {size}")
        return View((sides[0], sides[1]), random_crop, flip)

    def crop(self, pixels: Pixels, size: Size, seed: int, *address: int) -> tuple[Pixels, tuple[int, int]]:
        """(pixels [*size, 3], (top, left)) of a picture that covers `size`; crop and flip are drawn from the address.

        `left` counts in the mirrored picture where the sample is mirrored.
        """
        spare = (pixels.shape[0] - size[0], pixels.shape[1] - size[1])
        top, left = spare[0] // 2, spare[1] // 2
        if self.random_crop and any(spare):
            draw = key(seed, "crop", *address)
            top, left = (draw & 0xFFFFFFFF) % (spare[0] + 1), (draw >> 32 & 0xFFFFFFFF) % (spare[1] + 1)
        pixels = pixels[top : top + size[0], left : left + size[1]]
        if self.flip and key(seed, "flip", *address) & 1:
            return pixels[:, ::-1], (top, spare[1] - left)
        return pixels, (top, left)


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture of the requested size, or its precomputed latents, with its caption."""

    pixels: Pixels  # [H, W, 3]; [H, W, 0] with precomputed latents
    caption: str
    index: int
    original_size: Size  # (height, width) as stored
    crop: tuple[int, int]  # (top, left) in the resized picture, mirrored where the sample is
    moments: NDArray[np.float16] | None = None  # [2, C, h, w], precomputed latents
    texts: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # of precomputed captions, by name

    @property
    def image(self) -> Tensor:
        """[3, H, W] float32 in [-1, 1]; [0, H, W] with precomputed latents."""
        return as_images(self.pixels[None])[0]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`images` [3, H, W] and, where there are precomputed latents, `moments`: what a Batch stacks."""
        if self.moments is None:
            return {"images": self.image.numpy()}
        return {"images": np.empty((0, *self.pixels.shape[:2]), np.float32), "moments": self.moments}


def as_images(pixels: Pixels) -> Tensor:
    """Images [B, 3, H, W] float32 in [-1, 1] of pixels [B, H, W, 3]."""
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return images.to(torch.float32).div_(127.5).sub_(1.0)


@dataclass
class _Cache:
    """Decoded, resized, uncropped pictures by index and size, up to a number of bytes; none is removed."""

    limit_bytes: int
    pictures: dict[tuple[int, Size], tuple[Pixels, Size]] = field(default_factory=dict)
    used_bytes: int = 0

    def add(self, name: tuple[int, Size], picture: tuple[Pixels, Size]) -> None:
        if self.used_bytes + picture[0].nbytes <= self.limit_bytes:
            self.pictures[name] = picture
            self.used_bytes += picture[0].nbytes


class Fetcher:
    """Samples of a manifest, by index and epoch. Several threads may use it at once.

    It holds open files and, up to `cache_bytes`, decoded pictures; neither changes the result. `decode` is one of the
    DECODERS, `captions` says which caption a visit has, `selection` which samples are used.
    """

    def __init__(
        self,
        manifest: Manifest,
        view: View,
        seed: int = 0,
        cache_bytes: int = 0,
        decode: Decode = decode,
        captions: CaptionChoice | None = None,
        selection: Selection | None = None,
    ) -> None:
        self.manifest = manifest
        self.view = view
        self.seed = seed
        self.decode = decode
        self.captions = captions or CaptionChoice()
        self.selection = selection or Selection([len(manifest)])
        self._cache = _Cache(cache_bytes)
        self._shards = manifest.open_shards()

    def __call__(self, index: int, epoch: int = 0, size: Size | None = None) -> Sample:
        """The sample, at another (height, width) than the view's where one is given.

        Raises BadSample; UserError where its shard changed since it was indexed.
        """
        size = size or self.view.size
        caption = self.caption(index, epoch)
        picture = self._cache.pictures.get((index, size))
        if picture is None:
            picture = self._load(index, size)
            self._cache.add((index, size), picture)
        pixels, crop = self.view.crop(picture[0], size, self.seed, epoch, index)
        return Sample(pixels, caption, index, picture[1], crop)

    def fetch_or_substitute(
        self, index: int, epoch: int = 0, size: Size | None = None, places: range | None = None
    ) -> tuple[Sample, list[tuple[int, str]]]:
        """The sample or, where it is bad, its substitute; and (index, reason) of each bad one.

        The substitutes are drawn from (seed, epoch, index), among those at `places` of the selection (None: all).
        Only a permanently bad sample has one; other errors pass through. Raises UserError after a few in a row.
        """
        bad: list[tuple[int, str]] = []
        address = (self.seed, "substitute", epoch, index)
        places = places or range(len(self.selection))
        while len(bad) < TRIES:
            try:
                return self(index, epoch, size), bad
            except BadSample as reason:
                bad.append((index, str(reason)))
                index = self.selection[places[key(*address, len(bad)) % len(places)]]
        lines = "\n".join(f"  {self.manifest.key(i)} in {self.manifest.shard_of(i)}: {why}" for i, why in bad)
        raise UserError(f"{TRIES} samples in a row cannot be used:\n{lines}\nlook at these shards")

    def _load(self, index: int, size: Size) -> tuple[Pixels, Size]:
        """(resized picture, original size)."""
        stored_bytes = int(self.manifest.image_size[index])
        if stored_bytes > MAX_bytes:
            raise BadSample("too many bytes")
        return self.decode(self._read(index, int(self.manifest.image_offset[index]), stored_bytes), size)

    def check_captions(self) -> None:
        """Raises UserError where the captions need a field that the samples do not have."""
        self.captions.check(self.manifest, self._read)

    def caption(self, index: int, epoch: int = 0) -> str:
        """A sample's caption at a visit; BadSample where it has none and needs one."""
        return self.captions(self.manifest, self._read, index, self.seed, epoch)

    def alternatives(self, index: int) -> list[str]:
        """All captions that a visit of a sample may have; BadSample where it has none and needs one."""
        return self.captions.alternatives(self.manifest, self._read, index)

    def parts(self, index: int) -> dict[str, bytes]:
        """A sample's stored text and JSON, by "txt" and "json"; one that it lacks is left out."""
        columns = self.manifest
        places = {
            "txt": (int(columns.text_offset[index]), int(columns.text_size[index])),
            "json": (int(columns.json_offset[index]), int(columns.json_size[index])),
        }
        return {kind: self._read(index, *place) for kind, place in places.items() if place[1] >= 0}

    def _read(self, index: int, offset: int, size: int) -> bytes:
        """A range of the shard that holds a sample. Raises UserError where the shard is not the one indexed."""
        shard = self._shards[int(self.manifest.shard[index])]
        data = shard.read(offset, size)
        if len(data) < size:
            raise UserError(
                f"{shard.path} ends before byte {offset + size}, it changed after it was indexed; start again"
            )
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": _Cache(self._cache.limit_bytes)}
