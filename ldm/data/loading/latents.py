"""Latents that a first stage made beforehand, as shards to train from: `key.latents.safetensors` stands for
the picture.

Such a shard is an ordinary one: it has the sample's text and JSON parts beside the latents, and webdataset reads
it. The folder's record says which first stage made them, and from what.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from ldm.data.loading.caption_choice import CaptionChoice, Read, json_part
from ldm.data.loading.fetch import Fetcher, Sample, View
from ldm.data.order.selection import Selection
from ldm.data.shards.index import Manifest, load_manifest
from ldm.data.shards.picture import BadSample
from ldm.data.shards.remote import Remote
from ldm.data.shards.tar import LATENTS, PICTURE_KINDS
from ldm.errors import UserError
from ldm.randomness import key

RECORD = "latents.json"
FORMAT = 1
CAPTIONS = "latents.captions"  # in the JSON part: the captions that were encoded, in the order of their states
KIND = PICTURE_KINDS.index(LATENTS)

MOMENTS = "moments"  # [variants, 2, C, h, w]
PLACES = "places"  # [2 + variants, 2]: (height, width) encoded and stored, then (top, left) of each crop
BETWEEN_bytes = 1 << 13  # of headers and padding, at most, among members that are read in one go
KINDS: dict[str, type[np.generic]] = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "BOOL": np.bool_}


@dataclass(frozen=True)
class LatentRecord:
    """What a folder of cached latents depends on: another value of any of these is another cache.

    first_stage      fingerprint of the first stage that made them
    source           fingerprint of the pictures' shards
    sizes            (height, width) in pixels of what was encoded, of each bucket
    where            the filter of what was encoded
    decode           how JPEGs were decoded
    variants         crops and flips of each picture
    random_crop, flip   how the variants were taken; `seed` is what they were drawn from
    texts            names of the text encoders whose states are there too; a name holds a fingerprint
    captions         fields of the captions that they encoded; none: the text, else the JSON's caption
    """

    first_stage: str
    source: str
    sizes: tuple[tuple[int, int], ...]
    where: str | None = None
    decode: str = "exact"
    variants: int = 1
    random_crop: bool = False
    flip: bool = False
    seed: int = 0
    texts: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

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
        size = f"{self.sizes[0][0]}x{self.sizes[0][1]}" if len(self.sizes) == 1 else f"{len(self.sizes)}sizes"
        return f"{self.first_stage[:8]}-{size}{drawn}-{made}"


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
    listed = {name: tuple(known[name]) for name in ("texts", "captions")}
    return LatentRecord(**known | listed | {"sizes": tuple((h, w) for h, w in known["sizes"])})


def write_record(folder: Path, record: LatentRecord, finished: Mapping[str, Any] | None) -> None:
    """Writes the record, at once; `finished` are the counts of a complete cache, None where it is still being made."""
    facts = {"format": FORMAT, **asdict(record), "finished": finished is not None, **(finished or {})}
    unfinished = folder / f".{RECORD}.unfinished"
    unfinished.write_text(json.dumps(facts, indent=1))
    unfinished.replace(folder / RECORD)


def summary(folder: Path) -> str:
    """A line about a finished cache: where it is, how many samples it has, what one takes, how fast it was made."""
    facts: dict[str, Any] = json.loads((folder / RECORD).read_text())
    told = f"{folder}: {facts['samples']} samples of {facts['bytes_per_sample']} bytes, {facts['left_out']} left out"
    return f"{told}; {facts['pictures_per_second']} pictures/s in the first of its processes"


@dataclass(frozen=True)
class LatentSource:
    """A folder of cached latents to train from, in the place of a ShardSource.

    shards           the folder that python -m ldm.data.cache wrote
    require_caption, index, where, captions, weight   as of a ShardSource; `where` chooses among what is cached
    """

    shards: str
    require_caption: bool = True
    index: str | None = None
    where: str | None = None
    captions: Mapping[str, float] | None = None
    weight: float | None = None

    @property
    def remote(self) -> Remote | None:
        """None: the folder is a local one."""
        return None

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

    def fetcher(
        self,
        manifest: Manifest,
        sizes: Sequence[tuple[int, int]],
        seed: int,
        cache_bytes: int = 0,
        decode: str = "exact",
        chosen: Selection | None = None,
    ) -> "LatentFetcher":
        """Reads latents of pictures of `sizes`; UserError where they were made at others. Nothing is decoded."""
        record = read_record(Path(self.shards))
        if other := set(sizes) - set(record.sizes):
            raise UserError(
                f"data.size, data.buckets: the latents in {self.shards} are of pictures of {_told(record.sizes)}, none "
                f"of {_told(other)}; make others by training from the pictures with the knob latents"
            )
        captions = CaptionChoice(self.captions, self.require_caption)
        fetcher = LatentFetcher(manifest, record, sizes[0], seed, captions, chosen)
        fetcher.check_captions()
        return fetcher


class LatentFetcher(Fetcher):
    """Samples of cached latents, by index and epoch; the variant is drawn at every visit from (seed, epoch, index)."""

    def __init__(
        self,
        manifest: Manifest,
        record: LatentRecord,
        size: tuple[int, int],
        seed: int = 0,
        captions: CaptionChoice | None = None,
        chosen: Selection | None = None,
    ) -> None:
        super().__init__(manifest, View(size), seed, captions=captions, chosen=chosen)
        self.record = record

    def __call__(self, index: int, epoch: int = 0, size: tuple[int, int] | None = None) -> Sample:
        """The sample. Raises BadSample; UserError where its shard changed, or its latents are of another size."""
        columns = self.manifest
        if columns.image_kind[index] != KIND:
            raise BadSample("no latents")
        size = size or self.view.size
        read = self._at_once(index)
        caption = self.captions(columns, read, index, self.seed, epoch)
        arrays = unpack(read(index, int(columns.image_offset[index]), int(columns.image_size[index])))
        variant = key(self.seed, "variant", epoch, index) % self.record.variants if self.record.variants > 1 else 0
        moments = arrays.pop(MOMENTS)[variant]
        encoded, original, *crops = map(tuple, arrays.pop(PLACES).tolist())
        if encoded != size:
            raise UserError(
                f"the latents of {columns.key(index)} are of {_told([encoded])} pixels, its bucket is "
                f"{_told([size])}: the buckets have changed, make the latents anew (latents=ANOTHER_FOLDER)"
            )
        texts = self._texts(index, arrays, caption) if arrays else {}
        crop = crops[variant]
        return Sample(np.empty((*size, 0), np.uint8), caption, index, original, crop, moments, texts)

    def picture(self, sample: Sample) -> dict[str, NDArray[Any]]:
        """`moments` [2, C, h, w], and `images` without channels."""
        assert sample.moments is not None
        return {"images": np.empty((0, *sample.pixels.shape[:2]), np.float32), "moments": sample.moments}

    def _at_once(self, index: int) -> Read:
        """What reads a sample's parts: latents and text, which mostly are side by side, in one go."""
        columns = self.manifest
        start, text_size = int(columns.image_offset[index]), int(columns.text_size[index])
        size = int(columns.image_size[index])
        after = int(columns.text_offset[index]) + text_size - start if text_size > 0 else size
        if not size <= after <= size + text_size + BETWEEN_bytes:
            return self._read
        data = self._read(index, start, after)

        def read(index: int, offset: int, size: int) -> bytes:
            at = offset - start
            return data[at : at + size] if at >= 0 and at + size <= after else self._read(index, offset, size)

        return read

    def _texts(self, index: int, arrays: dict[str, NDArray[Any]], caption: str) -> dict[str, NDArray[Any]]:
        """What the text encoders made of the caption, by name; there is one row for each caption of the sample."""
        captions = json_part(self.manifest, self._read, index).get(CAPTIONS, [])
        if caption not in captions:
            raise UserError(
                f"the caption {caption!r} was not encoded when the latents were made: the choice of captions has "
                "changed; make them anew (latents=ANOTHER_FOLDER), or encode texts in training (latent_text=false)"
            )
        row = captions.index(caption)
        return {name: array[row] for name, array in arrays.items()}


def _told(sizes: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sorted(sizes))


def pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays by name as the bytes of a safetensors file."""
    data: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return data


def unpack(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file's bytes, without a copy. Raises BadSample where it is none."""
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        places = _places(data[8:start])
        return {
            name: np.frombuffer(data, kind, count, start + at).reshape(shape) for name, kind, shape, count, at in places
        }
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample("corrupt latents") from error


@lru_cache(maxsize=64)
def _places(header: bytes) -> list[tuple[str, type[np.generic], tuple[int, ...], int, int]]:
    """(name, type, shape, numbers, first byte) of each array; most samples of a cache have the same header."""
    found = json.loads(header)
    return [
        (name, KINDS[facts["dtype"]], tuple(facts["shape"]), int(np.prod(facts["shape"])), facts["data_offsets"][0])
        for name, facts in found.items()
        if name != "__metadata__"
    ]
