"""Precomputed latents of a first stage, as shards to train from: `key.latents.safetensors` replaces the picture.

Such a shard is an ordinary one: it has the sample's text and JSON parts next to the latents, and webdataset reads
it. The folder's record says which first stage computed them, and from what.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from ldm.checkpoint import write_atomic
from ldm.data.loading.caption_choice import json_part
from ldm.data.loading.fetch import Fetcher, Sample, View
from ldm.data.loading.shard_source import Source
from ldm.data.shards.index import Manifest, load_manifest
from ldm.data.shards.picture import BadSample, Size
from ldm.data.shards.tar import LATENTS, PICTURE_KINDS
from ldm.errors import UserError
from ldm.randomness import key

RECORD = "latents.json"
FORMAT = 1
CAPTIONS = "latents.captions"  # in the JSON part: the captions that were encoded, in the order of their states
KIND = PICTURE_KINDS.index(LATENTS)

MOMENTS = "moments"  # [variants, 2, C, h, w]
PLACES = "places"  # [2 + variants, 2]: (height, width) encoded and stored, then (top, left) of each crop
KINDS: dict[str, type[np.generic]] = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "BOOL": np.bool_}


@dataclass(frozen=True)
class LatentRecord:
    """What a folder of cached latents depends on: another value of any of these is another cache.

    first_stage      fingerprint of the first stage that encoded them
    source           fingerprint of the pictures' shards
    sizes            (height, width) in pixels of the encoded pictures, of each bucket
    where            the filter of the encoded pictures
    decode           how JPEGs were decoded
    variants         crops and flips of each picture
    random_crop, flip   how the variants were drawn, from `seed`
    texts            names of the text encoders whose states are there too; a name holds a fingerprint
    captions         fields of the captions that they encoded; none: the text, else the JSON's caption
    """

    first_stage: str
    source: str
    sizes: tuple[Size, ...]
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
        """A folder name, different for each record."""
        size = f"{self.sizes[0][0]}x{self.sizes[0][1]}" if len(self.sizes) == 1 else f"{len(self.sizes)}sizes"
        variants = f"-{self.variants}x{'c' * self.random_crop}{'f' * self.flip}" if self.variants > 1 else ""
        digest = f"{key(json.dumps(asdict(self))) & 0xFFFFFFFF:08x}"
        return f"{self.first_stage[:8]}-{size}{variants}-{digest}"


def read_record(folder: Path) -> LatentRecord:
    """The record of a finished cache. Raises UserError where there is none, or it is of another format."""
    path = folder / RECORD
    if not path.is_file():
        raise UserError(f"{folder} holds no cached latents (no {RECORD}); compute them with python -m ldm.data.cache")
    facts: dict[str, Any] = json.loads(path.read_text())
    if facts.get("format") != FORMAT:
        raise UserError(f"{path} is of format {facts.get('format')}, not {FORMAT}; compute the latents again")
    if not facts.get("finished"):
        raise UserError(f"the latents in {folder} are not complete; run python -m ldm.data.cache again, it resumes")
    names = LatentRecord.__dataclass_fields__
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items() if name in names}
    return LatentRecord(**values | {"sizes": tuple((h, w) for h, w in facts["sizes"])})


def write_record(folder: Path, record: LatentRecord, finished: Mapping[str, Any] | None) -> None:
    """Writes the record; `finished` are the counts of a complete cache, None while it is being computed."""
    facts = {"format": FORMAT, **asdict(record), "finished": finished is not None, **(finished or {})}
    with write_atomic(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(facts, indent=1))


def summary(folder: Path) -> str:
    """A line about a finished cache: where it is, how many samples it has, what one takes, how fast it was written."""
    facts: dict[str, Any] = json.loads((folder / RECORD).read_text())
    counts = f"{facts['samples']} samples of {facts['bytes_per_sample']} bytes, {facts['left_out']} left out"
    return f"{folder}: {counts}; {facts['pictures_per_second']} pictures/s in the first of its processes"


class LatentFetcher(Fetcher):
    """Samples of cached latents, by index and epoch; the variant is drawn at every visit from (seed, epoch, index)."""

    def __call__(self, index: int, epoch: int = 0, size: Size | None = None) -> Sample:
        """The sample. Raises BadSample; UserError where its shard changed, or its latents are of another size."""
        columns = self.manifest
        if columns.image_kind[index] != KIND:
            raise BadSample("no latents")
        size = size or self.view.size
        caption = self.caption(index, epoch)
        arrays = unpack(self._read(index, int(columns.image_offset[index]), int(columns.image_size[index])))
        variants = arrays.pop(MOMENTS)
        variant = key(self.seed, "variant", epoch, index) % len(variants) if len(variants) > 1 else 0
        encoded, original, *crops = map(tuple, arrays.pop(PLACES).tolist())
        if encoded != size:
            raise UserError(
                f"the latents of {columns.key(index)} are of {_listed([encoded])} pixels, its bucket is "
                f"{_listed([size])}: the buckets have changed, compute the latents again (latents=ANOTHER_FOLDER)"
            )
        texts = self._texts(index, arrays, caption) if arrays else {}
        empty = np.empty((*size, 0), np.uint8)
        return Sample(empty, caption, index, original, crops[variant], variants[variant], texts)

    def _texts(self, index: int, arrays: dict[str, NDArray[Any]], caption: str) -> dict[str, NDArray[Any]]:
        """The text encoders' states of the caption, by name; there is one row for each caption of the sample."""
        captions = json_part(self.manifest, self._read, index).get(CAPTIONS, [])
        if caption not in captions:
            raise UserError(
                f"the caption {caption!r} was not encoded with the latents: the choice of captions has changed; "
                "compute them again (latents=ANOTHER_FOLDER), or encode texts in training (latent_text=false)"
            )
        row = captions.index(caption)
        return {name: array[row] for name, array in arrays.items()}


@dataclass(frozen=True)
class LatentSource(Source):
    """A folder of precomputed latents to train from, instead of a ShardSource; see Source.

    shards           the folder that python -m ldm.data.cache wrote
    where            selects among the cached samples
    """

    fetcher_type: ClassVar[type[Fetcher]] = LatentFetcher

    @property
    def folder(self) -> Path:
        return Path(str(self.shards))

    @property
    def first_stage(self) -> str:
        """The fingerprint of the first stage that computed the latents."""
        return read_record(self.folder).first_stage

    def manifest(self) -> Manifest:
        """The manifest. Raises UserError where the cache is missing, incomplete or damaged."""
        read_record(self.folder)
        return load_manifest(self.shards, out=self.index)

    def _view(self, sizes: Sequence[Size]) -> View:
        record = read_record(self.folder)
        if missing := set(sizes) - set(record.sizes):
            raise UserError(
                f"data.size, data.buckets: the latents in {self.shards} are of pictures of {_listed(record.sizes)}, "
                f"none of {_listed(missing)}; compute others by training from the pictures with the knob latents"
            )
        return View(sizes[0])


def _listed(sizes: Iterable[Size]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sorted(sizes))


def pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays by name as the bytes of a safetensors file."""
    data: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return data


def unpack(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file's bytes, without a copy. Raises BadSample for other bytes.

    It reads cached latents an eighth faster than safetensors' own `load` (`python -m benchmarks.data --only rates`).
    """
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
    """(name, type, shape, count, first byte) of each array; most samples of a cache have the same header."""
    return [
        (name, KINDS[facts["dtype"]], tuple(facts["shape"]), int(np.prod(facts["shape"])), facts["data_offsets"][0])
        for name, facts in json.loads(header).items()
        if name != "__metadata__"
    ]
