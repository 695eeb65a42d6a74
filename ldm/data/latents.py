"""Latents that a first stage made beforehand, as shards to train from: `key.latents.npy` stands for the picture.

Such a shard is an ordinary one: it has the sample's text and JSON parts beside the latents, and webdataset reads
it. The folder's record says which first stage made them, and from what.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.fetch import Fetcher, Sample, View
from ldm.data.index import Manifest, load_manifest
from ldm.data.picture import BadSample
from ldm.data.tar import LATENTS, PICTURE_KINDS
from ldm.errors import UserError
from ldm.randomness import key

RECORD = "latents.json"
FORMAT = 1
FACTS = "latents"  # what the JSON part of a sample says of its variants
KIND = PICTURE_KINDS.index(LATENTS)

Moments = NDArray[np.float16]


@dataclass(frozen=True)
class LatentRecord:
    """What a folder of cached latents depends on: another value of any of these is another cache.

    first_stage      fingerprint of the first stage that made them
    source           fingerprint of the pictures' shards
    size             (height, width) in pixels of what was encoded
    variants         crops and flips of each picture
    random_crop, flip   how the variants were taken; `seed` is what they were drawn from
    """

    first_stage: str
    source: str
    size: tuple[int, int]
    variants: int = 1
    random_crop: bool = False
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variants < 1:
            raise UserError(f"variants={self.variants}: expected 1 or more")
        if self.variants == 1 and (self.random_crop or self.flip):
            raise UserError(
                "one variant would freeze each picture's crop and flip for the whole training: give variants=4 or "
                "more, or random_crop=false flip=false"
            )
        if self.variants > 1 and not (self.random_crop or self.flip):
            raise UserError(f"variants={self.variants} would all be the same: give random_crop=true, flip=true or both")

    @property
    def name(self) -> str:
        """A folder name of its own for each record."""
        drawn = (
            "".join(("", f"-{self.variants}x", "c" * self.random_crop, "f" * self.flip)) if self.variants > 1 else ""
        )
        made = f"{key(json.dumps(asdict(self))) & 0xFFFFFFFF:08x}"
        return f"{self.first_stage[:8]}-{self.size[0]}x{self.size[1]}{drawn}-{made}"


def read_record(folder: Path) -> LatentRecord:
    """The record of a finished cache. Raises UserError where there is none, or it is of another format."""
    path = folder / RECORD
    if not path.is_file():
        raise UserError(f"{folder} holds no cached latents (no {RECORD}); make them with python -m ldm.data.cache")
    facts: dict[str, Any] = json.loads(path.read_text())
    if facts.get("format") != FORMAT:
        raise UserError(f"{path} is of format {facts.get('format')}, this version reads {FORMAT}; make the cache anew")
    if not facts.get("finished"):
        raise UserError(f"the latents in {folder} are not complete; run python -m ldm.data.cache again, it goes on")
    names = LatentRecord.__dataclass_fields__
    known = {name: value for name, value in facts.items() if name in names}
    return LatentRecord(**known | {"size": tuple(known["size"])})


def write_record(folder: Path, record: LatentRecord, finished: Mapping[str, Any] | None) -> None:
    """Writes the record; `finished` are the counts of a complete cache, None where it is still being made."""
    facts = {"format": FORMAT, **asdict(record), "finished": finished is not None, **(finished or {})}
    (folder / RECORD).write_text(json.dumps(facts, indent=1))


@dataclass(frozen=True)
class LatentSource:
    """A folder of cached latents to train from, in the place of a ShardSource.

    shards           the folder that python -m ldm.data.cache wrote
    require_caption  a sample without caption is bad; false gives it the empty caption
    index            folder for the manifest; None: `.index` beside the shards
    """

    shards: str
    require_caption: bool = True
    index: str | None = None

    @property
    def first_stage(self) -> str:
        """The fingerprint of the first stage that made the latents."""
        return read_record(Path(self.shards)).first_stage

    def manifest(self) -> Manifest:
        """The manifest. Raises UserError where the cache is missing, incomplete or damaged."""
        read_record(Path(self.shards))
        return self.open()

    def open(self) -> Manifest:
        """The manifest, of a cache that is not declared finished too."""
        return load_manifest(self.shards, False, self.index)

    def fetcher(self, manifest: Manifest, size: int | Sequence[int], seed: int, cache_bytes: int) -> "LatentFetcher":
        """Reads latents of pictures of that size; UserError where they were made at another."""
        record = read_record(Path(self.shards))
        if View.of(size).size != record.size:
            raise UserError(
                f"data.size={size}: the latents in {self.shards} are of pictures of {record.size[0]}x{record.size[1]}; "
                "make others with python -m ldm.data.cache --size"
            )
        return LatentFetcher(manifest, record, seed, self.require_caption)


class LatentFetcher(Fetcher):
    """Samples of cached latents, by index and epoch; the variant is drawn at every visit from (seed, epoch, index)."""

    def __init__(self, manifest: Manifest, record: LatentRecord, seed: int = 0, require_caption: bool = True) -> None:
        super().__init__(manifest, View(record.size), seed, require_caption)
        self.record = record
        self._nothing = np.empty((*record.size, 0), np.uint8)
        self._headers: dict[bytes, tuple[tuple[int, ...], np.dtype[Any], int]] = {}

    def __call__(self, index: int, epoch: int = 0) -> Sample:
        """The sample. Raises BadSample; UserError where its shard changed since it was indexed."""
        columns = self.manifest
        if columns.image_kind[index] != KIND:
            raise BadSample("no latents")
        caption = self.caption(index)
        data = self._read(index, int(columns.image_offset[index]), int(columns.image_size[index]))
        variant = key(self.seed, "variant", epoch, index) % self.record.variants if self.record.variants > 1 else 0
        facts = json.loads(self._read(index, int(columns.json_offset[index]), int(columns.json_size[index])))[FACTS]
        original, crop = tuple(facts["original_size"]), tuple(facts["crops"][variant])
        return Sample(self._nothing, caption, index, original, crop, self._moments(data, variant))

    def pictures(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """`moments` [B, 2, C, h, w], and `images` without channels."""
        moments = torch.from_numpy(np.stack([sample.moments for sample in samples if sample.moments is not None]))
        return {"images": torch.empty(len(samples), 0, *self.record.size), "moments": moments}

    def _moments(self, data: bytes, variant: int) -> Moments:
        """One variant [2, C, h, w] of an .npy file [variants, 2, C, h, w]. Its header is parsed once for a shape."""
        start = 10 + int.from_bytes(data[8:10], "little")
        header = data[:start]
        if header not in self._headers:
            self._headers[header] = _npy_header(header)
        shape, kind, count = self._headers[header]
        try:
            return np.frombuffer(data, kind, count, start + variant * count * kind.itemsize).reshape(shape)
        except ValueError as error:
            raise BadSample("corrupt latents") from error


def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """(shape of a variant, type, numbers of a variant) of the first bytes of an .npy file."""
    file = io.BytesIO(header)
    try:
        npy.read_magic(file)
        shape, fortran, kind = npy.read_array_header_1_0(file)
    except ValueError as error:
        raise BadSample("corrupt latents") from error
    if fortran or len(shape) != 5 or shape[1] != 2 or kind != np.float16:
        raise BadSample("corrupt latents")
    return shape[1:], kind, int(np.prod(shape[1:]))
