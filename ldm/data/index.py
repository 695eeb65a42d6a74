"""The manifest of a list of shards: where each sample's parts lie, as memory-mapped columns.

Every shard's headers are read once. The manifest lies in `.index/` beside the shards, in a folder whose name
holds the shards' names, sizes and times of change: it is used again while these hold, and made anew when not.
The folder is written under another name and then renamed, so that processes that index at once agree.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from tqdm import tqdm

from ldm.data.shards import Shards, expand
from ldm.data.tar import COLUMNS, DAMAGE, IMAGE_KINDS, PROBLEMS, ShardScan, scan_shard
from ldm.errors import UserError

VERSION = 1
POOL_bytes = 256 << 20  # less than this is read sooner than processes are started


class Manifest:
    """The samples of a list of shards, in shard order.

    Columns (memory-mapped, one entry a sample): shard, image_offset, image_size, image_kind (an index into
    PICTURE_KINDS), text_offset, text_size, json_offset, json_size (size -1: there is none), caption (0 none,
    1 in the text, 2 in the JSON), width, height (pixels, from the JSON; 0: not known).
    """

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        self.folder = folder
        self.paths = list(paths)
        facts = json.loads((folder / "manifest.json").read_text())
        self.fingerprint: str = facts["fingerprint"]
        self.problems: dict[str, int] = facts["problems"]
        self.shards: list[dict[str, Any]] = facts["shards"]
        self._samples: int = facts["samples"]
        self.shard = self._column("shard")
        self.image_offset = self._column("image_offset")
        self.image_size = self._column("image_size")
        self.image_kind = self._column("image_kind")
        self.text_offset = self._column("text_offset")
        self.text_size = self._column("text_size")
        self.json_offset = self._column("json_offset")
        self.json_size = self._column("json_size")
        self.caption = self._column("caption")
        self.width = self._column("width")
        self.height = self._column("height")
        self._key_end = self._column("key_end")
        self._key_bytes = self._column("key_bytes")

    def __reduce__(self) -> tuple[type["Manifest"], tuple[Path, list[str]]]:
        return Manifest, (self.folder, self.paths)

    def __len__(self) -> int:
        return self._samples

    def _column(self, name: str) -> NDArray[Any]:
        column: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r" if self._samples else None)
        return column

    def key(self, index: int) -> str:
        """The sample's webdataset key."""
        start = int(self._key_end[index - 1]) if index else 0
        return self._key_bytes[start : int(self._key_end[index])].tobytes().decode()

    def shard_of(self, index: int) -> str:
        """The path of the shard that holds the sample."""
        return self.paths[int(self.shard[index])]

    def damaged(self) -> list[tuple[str, str]]:
        """(shard, what is wrong with it) for each cut shard and each with interleaved or repeated samples."""
        return [
            (path, "; ".join(facts["examples"]))
            for path, facts in zip(self.paths, self.shards, strict=True)
            if any(facts["problems"].get(kind) for kind in DAMAGE)
        ]


def index_shards(shards: Shards, out: str | Path | None = None, progress: bool = False) -> Manifest:
    """The manifest of the shards: read back where it still fits them, made otherwise.

    `out` holds the manifests instead of `.index/` beside the shards. Damage is counted in the manifest.
    Raises UserError where shards are missing or the folder cannot be written.
    """
    paths = expand(shards)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = [os.path.relpath(os.path.abspath(path), root) for path in paths]
    kept = Path(out) if out is not None else Path(root) / ".index"
    name = _digest([VERSION, *names])[:16]
    folder = kept / f"{name}-{_digest([(s.st_size, s.st_mtime_ns) for s in map(os.stat, paths)])[:16]}"
    if not (folder / "manifest.json").is_file():
        try:
            _make(folder, paths, names, progress)
        except OSError as error:
            raise UserError(f"cannot keep the index in {kept} ({error}); give another folder") from error
        for stale in kept.glob(f"{name}-*"):
            if stale != folder:
                shutil.rmtree(stale, ignore_errors=True)
    return Manifest(folder, paths)


def load_manifest(shards: Shards, allow_damaged: bool = False, out: str | Path | None = None) -> Manifest:
    """The manifest of shards to train on. Raises UserError for damage (unless allowed) and for no samples."""
    manifest = index_shards(shards, out)
    damaged = manifest.damaged()
    if damaged and not allow_damaged:
        listed = "\n".join(f"  {path}: {what}" for path, what in damaged[:5])
        raise UserError(
            f"{len(damaged)} of {len(manifest.paths)} shards are damaged:\n{listed}\n"
            "write them anew or leave them out; allow_damaged=true trains on their whole samples"
        )
    if not len(manifest):
        raise UserError(
            f"no samples in {len(manifest.paths)} shards, the first is {manifest.paths[0]}; "
            f"a sample is key.{{{','.join(IMAGE_KINDS)}}} with key.txt or key.json"
        )
    return manifest


def _digest(facts: object) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _scans(paths: list[str], progress: bool) -> Iterator[ShardScan]:
    """The scans of the shards in order, by as many processes as the amount is worth."""
    workers = min(len(paths), os.cpu_count() or 1)
    bar: Any = tqdm(total=len(paths), unit="shard", disable=not progress, desc="index")
    with bar:
        if workers == 1 or sum(map(os.path.getsize, paths)) < POOL_bytes:
            for scan in map(scan_shard, paths):
                bar.update()
                yield scan
            return
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for scan in pool.map(scan_shard, paths):
                bar.update()
                yield scan


class _Column:
    """A one-dimensional .npy file that grows; its header is rewritten once the length is known."""

    def __init__(self, path: Path, kind: type[np.generic]) -> None:
        self.file: BinaryIO = path.open("wb")
        self.kind = np.dtype(kind)
        self.length = 0
        self._header()

    def _header(self) -> None:
        """NumPy leaves room for any length of the first axis, so the header's own size does not change."""
        facts = {"descr": npy.dtype_to_descr(self.kind), "fortran_order": False, "shape": (self.length,)}
        npy.write_array_header_1_0(self.file, facts)

    def add(self, values: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(values, self.kind).tobytes())
        self.length += len(values)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()


def _make(folder: Path, paths: list[str], names: list[str], progress: bool) -> None:
    """Writes the manifest of the shards under another name and renames it to `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        _write(unfinished, _scans(paths, progress), names)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / "manifest.json").is_file():  # else another process was first: the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(folder: Path, scans: Iterator[ShardScan], names: list[str]) -> None:
    """Writes the columns shard by shard, so that memory holds one shard's at a time."""
    kinds: dict[str, type[np.generic]] = {
        "shard": np.int32,
        **COLUMNS,
        "key_end": np.int64,
        "key_bytes": np.uint8,
    }
    columns = {name: _Column(folder / f"{name}.npy", kind) for name, kind in kinds.items()}
    shards: list[dict[str, Any]] = []
    for number, (name, scan) in enumerate(zip(names, scans, strict=True)):
        columns["shard"].add(np.full(len(scan.keys), number))
        for column, values in scan.columns.items():
            columns[column].add(values)
        ends = np.cumsum([len(key) for key in scan.keys], dtype=np.int64)
        columns["key_end"].add(ends + columns["key_bytes"].length)
        columns["key_bytes"].add(np.frombuffer(b"".join(scan.keys), np.uint8))
        shards.append(
            {
                "name": name,
                "bytes": scan.size_bytes,
                "mtime_ns": scan.mtime_ns,
                "samples": len(scan.keys),
                "keys": scan.keys_digest,
                "problems": {kind: n for kind, n in scan.problems.items() if n},
                "examples": scan.examples,
            }
        )
    for written in columns.values():
        written.close()
    totals = sum((Counter(shard["problems"]) for shard in shards), Counter[str]())
    facts = {
        "version": VERSION,
        "samples": sum(shard["samples"] for shard in shards),
        "fingerprint": _digest([[s["name"], s["bytes"], s["samples"], s["keys"]] for s in shards]),
        "problems": {kind: totals[kind] for kind in PROBLEMS},
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(facts, indent=1))


def _table(manifest: Manifest) -> str:
    """The counts, and the damaged shards with what is wrong."""
    rows: list[tuple[str, int]] = [
        ("shards", len(manifest.paths)),
        ("  damaged", len(manifest.damaged())),
        ("samples", len(manifest)),
    ]
    rows += [(f"  {kind}", count) for kind, count in manifest.problems.items()]
    lines = [f"{name:<16}{count:>12,}" for name, count in rows]
    lines.append(f"{'fingerprint':<16}{manifest.fingerprint[:12]:>12}")
    lines += [f"{path}: {what}" for path, what in manifest.damaged()[:20]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ldm.data.index SHARDS...`; status 1 where a shard is damaged or nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m ldm.data.index", description=__doc__)
    parser.add_argument("shards", nargs="+", help="a folder, a pattern like data/{00000..00127}.tar, files")
    parser.add_argument("--out", help="where to keep the manifest (default: .index beside the shards)")
    options = parser.parse_args(arguments)
    try:
        manifest = index_shards(options.shards, options.out, progress=True)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(_table(manifest))
    return 1 if manifest.damaged() or not len(manifest) else 0


if __name__ == "__main__":
    sys.exit(main())
