"""Pictures and their captions into shards: `python -m ldm.data.pack SOURCE OUT`.

SOURCE is a folder of pictures with x.txt or x.json next to x.png, or a folder whose captions a function gives
(--caption-from), or a .csv, .jsonl or .parquet table with the columns path (relative to the table) and
caption, or shards, whose members are copied unchanged. A sample becomes key.png, key.txt and key.json (its
caption, width, height and sha256, and the facts of its own JSON or row). The bytes of a picture are kept unless an
option changes them. The same source gives the same shards; an interrupted packing resumes and keeps its finished
shards.
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
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ldm.checkpoint import write_atomic
from ldm.data.shards.pack_source import read_source
from ldm.data.shards.packing import Packable, Packing
from ldm.data.shards.write import write_shard
from ldm.errors import UserError

SAMPLES = 1000  # of a shard
END_bytes = 10240  # a tar file's length is a multiple of this


@dataclass
class Packed:
    """The counts of a packing: samples written by split, and those left out, by reason."""

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
    samples: list[Packable]


def _write(shard: _Shard, packing: Packing) -> tuple[int, list[str]]:
    """Writes one shard; (samples written, pictures that cannot be read and are left out)."""
    broken: list[str] = []

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for sample in shard.samples:
            try:
                yield sample.key, sample.parts(packing)
            except UserError:
                raise
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                broken.append(f"{sample.path}: {error}")

    return write_shard(shard.path, samples()), broken


def in_val(key: str, fraction: float) -> bool:
    """Whether a key is in the validation split: its hash, as a number in [0, 1), is below the fraction."""
    hashed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return hashed < fraction * 2.0**64


def _layout(samples: Sequence[Packable], out: Path, packing: Packing) -> list[_Shard]:
    """The shards of the samples, in the samples' order."""
    splits: dict[str, list[Packable]] = {"train": list(samples)}
    if packing.val_fraction > 0:
        splits = {"train": [], "val": []}
        for sample in samples:
            splits["val" if in_val(sample.key, packing.val_fraction) else "train"].append(sample)
    return [
        _Shard((out / split if packing.val_fraction > 0 else out) / f"{number:05d}.tar", split, part)
        for split, members in splits.items()
        for number, part in enumerate(_parts(members, packing))
    ]


def _parts(samples: Sequence[Packable], packing: Packing) -> Iterator[list[Packable]]:
    """The samples in order, in lists within the limits of a shard; a larger sample is alone."""
    count = packing.shard_samples or (len(samples) if packing.shard_bytes else SAMPLES)
    part: list[Packable] = []
    part_bytes = END_bytes
    for sample in samples:
        size = sample.tar_bytes if packing.shard_bytes else 0
        if part and (len(part) == count or (packing.shard_bytes and part_bytes + size > packing.shard_bytes)):
            yield part
            part, part_bytes = [], END_bytes
        part.append(sample)
        part_bytes += size
    if part:
        yield part


@contextmanager
def _locked(out: Path, samples: Sequence[Packable], packing: Packing) -> Iterator[None]:
    """Locks OUT for this packing, which is recorded there, and removes unfinished files of an interrupted one.

    Raises UserError where another packing is there, or at work.
    """
    identities = json.dumps([sample.identity() for sample in samples], sort_keys=True, default=str)
    facts = asdict(packing) | {"entries": hashlib.sha256(identities.encode()).hexdigest()}
    record = out / "pack.json"
    if not record.is_file():
        if any(out.glob("*.tar")) or any(out.glob("*/*.tar")):
            raise UserError(f"{out} holds shards already; give an empty folder")
        with write_atomic(record) as temporary:
            temporary.write_text(json.dumps(facts, indent=1))
    elif json.loads(record.read_text()) != facts:
        raise UserError(f"{out} holds shards of another packing; give an empty folder, or remove that one")
    with record.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is packing into {out}; wait for it, or stop it") from error
        _remove_unfinished(out)
        yield
        _remove_unfinished(out)  # of workers that outlived their process for a moment


def _remove_unfinished(out: Path) -> None:
    for path in (*out.glob(".*.tar.*.tmp"), *out.glob("*/.*.tar.*.tmp")):
        path.unlink(missing_ok=True)


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
    samples, left_out = read_source(source, caption_from, allow_damaged)
    packed = Packed(left_out=left_out, renamed=sum(sample.renamed for sample in samples))
    if not samples:
        reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UserError(f"{source} has no picture with a caption ({reasons or 'no pictures at all'})")
    with _locked(Path(out), samples, packing):
        _pack(_layout(samples, Path(out), packing), packing, workers, progress, packed)
    return packed


def _pack(shards: list[_Shard], packing: Packing, workers: int, progress: bool, packed: Packed) -> None:
    """Writes the shards that are not there yet."""
    missing = [shard for shard in shards if not shard.path.is_file()]
    total = sum(len(shard.samples) for shard in shards)
    packed.shards, packed.kept_shards = len(shards), len(shards) - len(missing)
    with tqdm(total=total, unit="picture", desc="pack", disable=not progress) as bar:
        bar.update(total - sum(len(shard.samples) for shard in missing))
        for shard, (count, broken) in zip(missing, _write_all(missing, packing, workers), strict=True):
            bar.update(len(shard.samples))
            packed.samples[shard.split] += count
            packed.broken += broken
    packed.left_out["broken"] += len(packed.broken)


def _write_all(shards: list[_Shard], packing: Packing, workers: int) -> Iterator[tuple[int, list[str]]]:
    write = partial(_write, packing=packing)
    workers = min(workers, len(shards))
    if workers <= 1:
        yield from map(write, shards)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent) as pool:
        yield from pool.map(write, shards)


def _end_with_parent() -> None:
    """Ends this process when the one that started it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch(sentinel: int) -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _table(packed: Packed) -> str:
    rows = [("shards", packed.shards), ("  kept from before", packed.kept_shards)]
    rows += [(f"samples, {split}", count) for split, count in packed.samples.items()]
    rows += [("renamed, key in two shards", packed.renamed)] if packed.renamed else []
    rows += [(f"left out: {reason}", count) for reason, count in packed.left_out.items() if count]
    return "".join(f"{name:<28}{count:>10,}\n" for name, count in rows)


def _whole(text: str) -> int:
    return int(float(text))


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
    parser.add_argument("--shard-bytes", type=_whole, help="bytes of a shard at most, e.g. 1e9")
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
        packing = Packing(**{each.name: getattr(options, each.name) for each in fields(Packing)})
        how = (options.caption_from, options.workers, True, options.allow_damaged)
        packed = pack(options.source, options.out, packing, *how)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(_table(packed))
    if packed.broken:
        sys.stderr.write("\n".join(["pictures that cannot be read were left out:", *packed.broken[:10], ""]))
    return 1 if packed.broken else 0
