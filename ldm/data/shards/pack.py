"""Pictures and their captions into shards: `python -m ldm.data.pack SOURCE OUT`.

SOURCE is a folder of pictures with x.txt or x.json beside x.png, or a folder whose captions a function gives
(--caption-from), or a .csv, .jsonl or .parquet table with the columns path (relative to the table) and
caption, or shards, whose members are kept as they are. A sample becomes key.png, key.txt and key.json (its
caption, width, height and sha256, and what its own JSON or row said). The bytes of a picture are kept unless an
option asks for others. The same source gives the same shards; a packing that was stopped goes on, its finished
shards are kept.
"""

import argparse
import fcntl
import hashlib
import json
import multiprocessing
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from multiprocessing.connection import wait
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from ldm.data.shards.pack_source import read_source
from ldm.data.shards.packable import Packable
from ldm.data.shards.picture import cover
from ldm.data.shards.reshard import ShardSample
from ldm.data.shards.write import write_shard
from ldm.errors import UserError

ORIENTATION = 0x0112  # EXIF's tag
SAMPLES = 1000  # of a shard
END_bytes = 10240  # a tar file's length is a multiple of this
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class Packing:
    """How pictures are stored.

    size           a longer shorter side is reduced to this many pixels; None keeps the size
    background     colour that transparency is laid on; None keeps it
    format         jpg (quality 95), png or webp (lossless); None keeps the picture's own
    shard_samples  of each shard; the last one has fewer; None: 1000, or as many as shard_bytes allows
    shard_bytes    that a shard's samples take at most, with their pictures as the source has them
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
                raise UserError(f"{self.background} is no colour; give a name or #rrggbb") from error

    @property
    def touches(self) -> bool:
        """Whether pictures may be stored in other bytes than they have."""
        return any(value is not None for value in (self.size, self.background, self.format))


@dataclass
class Packed:
    """What a packing did: samples written by split, and what was left out, by reason."""

    samples: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    kept_shards: int = 0
    renamed: int = 0  # samples of shards whose key another shard has, too
    left_out: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Shard:
    """One shard to be written."""

    path: Path
    split: str
    entries: list[Packable]


@dataclass
class _Written:
    split: str
    samples: int
    broken: list[str]


def encode(data: bytes, packing: Packing) -> tuple[bytes, str, tuple[int, int]]:
    """(bytes, extension, (width, height)) of a picture as it is stored; the size is that of the upright picture.

    Raises OSError or ValueError where it cannot be read.
    """
    image: Image.Image = Image.open(BytesIO(data), formats=tuple(FORMATS.values()))
    own = "jpg" if image.format == "MPO" else next(short for short, name in FORMATS.items() if name == image.format)
    image.load()  # a cut file fails here, not in training
    upright = image
    if own == "jpg" and image.getexif().get(ORIENTATION, 1) != 1:
        upright = ImageOps.exif_transpose(image)
    changed = _repainted(upright, packing)
    if changed is upright and packing.format in (None, own):
        return data, own, upright.size
    chosen = packing.format or own
    stored = BytesIO()
    if chosen == "jpg":
        changed.convert("RGB").save(stored, "JPEG", quality=95, subsampling=0)
    elif chosen == "webp":
        changed.save(stored, "WEBP", lossless=True, quality=30, method=1)
    else:
        changed.save(stored, "PNG", optimize=False)
    return stored.getvalue(), chosen, changed.size


def _repainted(image: Image.Image, packing: Packing) -> Image.Image:
    """The picture on its background and within its bound; the same object where both hold already."""
    bare = image
    clear = "A" in image.getbands() or "transparency" in image.info
    if packing.background is not None and clear:
        layers = image.convert("RGBA")
        image = Image.new("RGB", layers.size, packing.background)
        image.paste(layers, mask=layers.getchannel("A"))
    if packing.size is not None and min(image.size) > packing.size:
        if image.mode not in ("RGB", "RGBA", "L", "LA"):
            image = image.convert("RGBA" if clear else "RGB")
        image = cover(image, (packing.size, packing.size))
    if image is not bare or packing.format is None:
        return image
    return image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGBA" if clear else "RGB")


def _write(shard: _Shard, packing: Packing) -> _Written:
    """Writes one shard; pictures that cannot be read are left out."""
    broken: list[str] = []

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for entry in shard.entries:
            try:
                yield entry.key, entry.parts(partial(encode, packing=packing), packing.touches)
            except UserError:
                raise
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                broken.append(f"{entry.path}: {error}")

    return _Written(shard.split, write_shard(shard.path, samples()), broken)


def in_val(key: str, fraction: float) -> bool:
    """Whether a key is in the validation split: its hash, as a number in [0, 1), is below the fraction."""
    hashed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return hashed < fraction * 2.0**64


def _layout(entries: Sequence[Packable], out: Path, packing: Packing) -> list[_Shard]:
    """The shards that the entries make, in the entries' order."""
    splits: dict[str, list[Packable]] = {"train": list(entries)}
    if packing.val_fraction > 0:
        splits = {"train": [], "val": []}
        for entry in entries:
            splits["val" if in_val(entry.key, packing.val_fraction) else "train"].append(entry)
    shards = []
    for split, held in splits.items():
        folder = out / split if packing.val_fraction > 0 else out
        for number, part in enumerate(_parts(held, packing)):
            shards.append(_Shard(folder / f"{number:05d}.tar", split, part))
    return shards


def _parts(entries: Sequence[Packable], packing: Packing) -> Iterator[list[Packable]]:
    """The entries in order, in lists that hold as many as a shard may; a larger entry is alone."""
    count = packing.shard_samples or (len(entries) if packing.shard_bytes else SAMPLES)
    part: list[Packable] = []
    held_bytes = END_bytes
    for entry in entries:
        size = entry.tar_bytes if packing.shard_bytes else 0
        if part and (len(part) == count or (packing.shard_bytes and held_bytes + size > packing.shard_bytes)):
            yield part
            part, held_bytes = [], END_bytes
        part.append(entry)
        held_bytes += size
    if part:
        yield part


@contextmanager
def _claimed(out: Path, entries: Sequence[Packable], packing: Packing) -> Iterator[None]:
    """Holds OUT for this packing, which is noted there; what a stopped one left unfinished is removed.

    Raises UserError where another packing is, or is at work.
    """
    listed = json.dumps([entry.identity() for entry in entries], sort_keys=True, default=str)
    facts = asdict(packing) | {"entries": hashlib.sha256(listed.encode()).hexdigest()}
    note = out / "pack.json"
    if not note.is_file():
        if any(out.glob("*.tar")) or any(out.glob("*/*.tar")):
            raise UserError(f"{out} holds shards already; give an empty folder")
        out.mkdir(parents=True, exist_ok=True)
        unfinished = out / f".pack.{os.getpid()}"
        unfinished.write_text(json.dumps(facts, indent=1))
        unfinished.replace(note)
    elif json.loads(note.read_text()) != facts:
        raise UserError(f"{out} holds shards of another packing; give an empty folder, or remove that one")
    with note.open() as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is packing into {out}; wait for it, or stop it") from error
        _clear(out)
        yield
        _clear(out)  # of workers that outlived their process for a moment


def _clear(out: Path) -> None:
    for left in (*out.glob(".*.unfinished"), *out.glob("*/.*.unfinished")):
        left.unlink(missing_ok=True)


def pack(
    source: str | Path,
    out: str | Path,
    packing: Packing | None = None,
    caption_from: str | None = None,
    workers: int = 1,
    progress: bool = False,
    allow_damaged: bool = False,
) -> Packed:
    """Writes the shards of a source and returns the counts. Raises UserError where nothing can be packed."""
    packing = packing or Packing()
    entries, left_out = read_source(source, caption_from, allow_damaged)
    done = Packed(left_out=left_out, renamed=sum(isinstance(entry, ShardSample) and entry.renamed for entry in entries))
    if not entries:
        told = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UserError(f"{source} has no picture with a caption ({told or 'no pictures at all'})")
    with _claimed(Path(out), entries, packing):
        _pack(_layout(entries, Path(out), packing), packing, workers, progress, done)
    return done


def _pack(shards: list[_Shard], packing: Packing, workers: int, progress: bool, done: Packed) -> None:
    """Writes the shards that are not there yet."""
    waiting = [shard for shard in shards if not shard.path.is_file()]
    total = sum(len(shard.entries) for shard in shards)
    done.shards, done.kept_shards = len(shards), len(shards) - len(waiting)
    with tqdm(total=total, unit="picture", desc="pack", disable=not progress) as bar:
        bar.update(total - sum(len(shard.entries) for shard in waiting))
        for shard, written in zip(waiting, _written(waiting, packing, workers), strict=True):
            bar.update(len(shard.entries))
            done.samples[written.split] += written.samples
            done.broken += written.broken
    done.left_out["broken"] += len(done.broken)


def _written(shards: list[_Shard], packing: Packing, workers: int) -> Iterator[_Written]:
    write = partial(_write, packing=packing)
    workers = min(workers, len(shards))
    if workers <= 1:
        yield from map(write, shards)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent) as pool:
        yield from pool.map(write, shards)


def _end_with_parent() -> None:
    """Ends this process when the one that started it was killed and could not say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch(sentinel: int) -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _table(done: Packed) -> str:
    rows = [("shards", done.shards), ("  kept from before", done.kept_shards)]
    rows += [(f"samples, {split}", count) for split, count in done.samples.items()]
    rows += [("renamed, key in two shards", done.renamed)] if done.renamed else []
    rows += [(f"left out: {reason}", count) for reason, count in done.left_out.items() if count]
    return "".join(f"{name:<28}{count:>10,}\n" for name, count in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ldm.data.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a folder, a .csv, .jsonl or .parquet table, or shards")
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument("--size", type=int, help="reduce a longer shorter side to this many pixels")
    parser.add_argument("--shard-samples", type=int, help="samples of a shard (1000)")
    parser.add_argument("--shard-bytes", type=float, help="bytes of a shard at most, e.g. 1e9")
    parser.add_argument("--caption-from", metavar="MODULE:FUNCTION", help="gives a path's caption, or None")
    parser.add_argument("--val-fraction", type=float, default=0.0, help="share that goes to OUT/val (0)")
    parser.add_argument("--background", help="colour to lay transparency on, e.g. white")
    parser.add_argument("--format", help="jpg, png or webp (lossless); default: as it is")
    parser.add_argument("--allow-damaged", action="store_true", help="pack the whole samples of damaged shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ldm.data.pack SOURCE OUT`; status 1 where nothing was packed or a picture was broken."""
    options = _parser().parse_args(arguments)
    try:
        packing = Packing(
            size=options.size,
            background=options.background,
            format=options.format,
            shard_samples=options.shard_samples,
            shard_bytes=None if options.shard_bytes is None else int(options.shard_bytes),
            val_fraction=options.val_fraction,
        )
        how = (options.caption_from, options.workers, True, options.allow_damaged)
        done = pack(options.source, options.out, packing, *how)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(_table(done))
    if done.broken:
        sys.stderr.write("\n".join(["pictures that cannot be read were left out:", *done.broken[:10], ""]))
    return 1 if done.broken else 0
