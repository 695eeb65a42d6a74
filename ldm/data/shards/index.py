"""The manifest of a list of shards: the place of each sample's parts, as memory-mapped columns.

Every shard's headers are read once. The manifest is in `.index/` next to the shards, in a folder whose name
depends on the shards' names, sizes and times of change: it is used while these hold, and written again otherwise.
The folder is written under another name and then renamed, so that several processes may index at once.
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
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ldm.data.shards.columns import Column, NumberColumns, number_file
from ldm.data.shards.numbers import SIDES
from ldm.data.shards.remote import Remote, is_remote
from ldm.data.shards.shards import REQUESTS, OpenShards, Shards, expand, relative_names, states
from ldm.data.shards.tar import COLUMNS, DAMAGE, IMAGE_KINDS, LEFT_OUT, PROBLEMS, ShardScan, scan_shard
from ldm.errors import UserError, nearest

VERSION = 2
POOL_bytes = 256 << 20  # less than this is read sooner than processes are started


class Manifest:
    """The samples of a list of shards, in shard order.

    Columns (memory-mapped, one entry a sample): shard, image_offset, image_size, image_kind (an index into
    PICTURE_KINDS), text_offset, text_size, json_offset, json_size (size -1: there is none), caption (0 none,
    1 in the text, 2 in the JSON), width, height (pixels, from the JSON, else the picture's header; 0: unknown).
    `column` gives these two and the JSON's numbers by name.
    """

    def __init__(self, folder: Path, paths: Sequence[str], remote: Remote | None = None) -> None:
        self.folder = folder
        self.paths = list(paths)
        self.remote = remote
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
        self._numbers: dict[str, int] = {name: place for place, name in enumerate(facts["columns"])}
        self._key_end = self._column("key_end")
        self._key_bytes = self._column("key_bytes")

    def __reduce__(self) -> tuple[type["Manifest"], tuple[Path, list[str], Remote | None]]:
        return Manifest, (self.folder, self.paths, self.remote)

    def __len__(self) -> int:
        return self._samples

    def _column(self, name: str) -> NDArray[Any]:
        column: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r" if self._samples else None)
        return column.view(np.ndarray)  # the same mapped memory; one number of a np.memmap takes several times as long

    def open_shards(self) -> OpenShards:
        """The shards, to be read by their place in `paths`; one that changed since it was indexed raises UserError."""
        states = [(shard["bytes"], shard["mtime_ns"]) for shard in self.shards]
        return OpenShards(self.paths, remote=self.remote, states=states)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the numeric columns: width, height, and every name that has a number in a JSON part."""
        return tuple(self._numbers)

    def column(self, name: str) -> NDArray[np.float64]:
        """A numeric column, float64, memory-mapped; NaN where a sample lacks it. true is 1, false is 0.

        Raises UserError, with the nearest names, for an unknown one.
        """
        if name not in self._numbers:
            raise UserError(f"the shards have no numeric column {name}; {nearest(name, self.columns)}")
        return self._column(number_file(self.folder, self._numbers[name]).stem)

    def key(self, index: int) -> str:
        """The sample's webdataset key."""
        start = int(self._key_end[index - 1]) if index else 0
        return self._key_bytes[start : int(self._key_end[index])].tobytes().decode()

    def shard_of(self, index: int) -> str:
        """The path of the shard that holds the sample."""
        return self.paths[int(self.shard[index])]

    def damaged(self) -> list[tuple[str, str]]:
        """(shard, its problems) for each cut shard and each with interleaved or repeated samples."""
        return [
            (path, "; ".join(facts["examples"]))
            for path, facts in zip(self.paths, self.shards, strict=True)
            if any(facts["problems"].get(kind) for kind in DAMAGE)
        ]

    def findings(self) -> list[tuple[str, str]]:
        """(shard, its problems) for each damaged shard and each with oversized or gigapixel samples."""
        pairs = zip(self.paths, self.shards, strict=True)
        return [(path, "; ".join(facts["examples"])) for path, facts in pairs if facts["examples"]]


def index_shards(
    shards: Shards, out: str | Path | None = None, progress: bool = False, remote: Remote | None = None
) -> Manifest:
    """The manifest of the shards: an existing one that still fits them, else a new one.

    `out` is for the manifests instead of `.index/` next to the shards, or ~/.cache/ldm/index for remote ones. Damage
    is counted in the manifest. Raises UserError where shards are missing or the folder cannot be written.
    """
    paths = expand(shards)
    home, name = _home(paths, out)
    state = states(paths, remote)
    folder = home / f"{name}-{_digest([VERSION, *state])[:16]}"
    if not (folder / "manifest.json").is_file():
        try:
            _write_folder(folder, paths, _scans(paths, sum(size for size, _ in state), progress, remote))
        except OSError as error:
            raise UserError(f"cannot keep the index in {home} ({error}); give another folder") from error
        for stale in home.glob(f"{name}-*"):
            if stale != folder:
                shutil.rmtree(stale, ignore_errors=True)
    return Manifest(folder, paths, remote)


def _home(paths: list[str], out: str | Path | None) -> tuple[Path, str]:
    """The folder of the manifests, and how the name of this list's manifest begins in it."""
    if out is None and not any(map(is_remote, paths)):
        root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        return Path(root) / ".index", _digest(relative_names(paths))[:16]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    full = [path if is_remote(path) else os.path.abspath(path) for path in paths]
    return Path(out) if out is not None else caches / "ldm" / "index", _digest(full)[:16]


def _indexed(shards: Shards, out: str | Path | None, remote: Remote | None) -> Manifest:
    """The manifest; that of remote shards without requesting their state, which their readers compare."""
    paths = expand(shards)
    if any(map(is_remote, paths)):
        home, name = _home(paths, out)
        folders = [folder for folder in home.glob(f"{name}-*") if (folder / "manifest.json").is_file()]
        if len(folders) == 1 and json.loads((folders[0] / "manifest.json").read_text())["version"] == VERSION:
            return Manifest(folders[0], paths, remote)
    return index_shards(shards, out, remote=remote)


def load_manifest(
    shards: Shards, allow_damaged: bool = False, out: str | Path | None = None, remote: Remote | None = None
) -> Manifest:
    """The manifest of shards to train on. Raises UserError for damage (unless allowed) and for a lack of samples."""
    manifest = _indexed(shards, out, remote)
    damaged = manifest.damaged()
    if damaged and not allow_damaged:
        listed = "\n".join(f"  {path}: {what}" for path, what in damaged[:5])
        raise UserError(
            f"{len(damaged)} of {len(manifest.paths)} shards are damaged:\n{listed}\n"
            "write them again or leave them out; allow_damaged=true trains on their whole samples"
        )
    if not len(manifest):
        raise UserError(
            f"no samples in {len(manifest.paths)} shards, the first is {manifest.paths[0]}; "
            f"a sample is key.{{{','.join(IMAGE_KINDS)}}} with key.txt or key.json"
        )
    return manifest


def _digest(facts: object) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _scans(paths: list[str], size_bytes: int, progress: bool, remote: Remote | None) -> Iterator[ShardScan]:
    """The scans of the shards in order: by processes where they are large, by threads where servers answer."""
    remotely = any(map(is_remote, paths))
    workers = min(len(paths), REQUESTS if remotely else os.cpu_count() or 1)
    scan = partial(scan_shard, remote=remote) if remote else scan_shard
    pool: Executor | None = None
    if workers > 1 and size_bytes >= POOL_bytes:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    elif workers > 1 and remotely:
        pool = ThreadPoolExecutor(workers)
    bar: Any = tqdm(total=len(paths), unit="shard", disable=not progress, desc="index")
    with bar, pool or nullcontext():
        for result in pool.map(scan, paths) if pool else map(scan, paths):
            bar.update()
            yield result


def _write_folder(folder: Path, paths: list[str], scans: Iterator[ShardScan]) -> None:
    """Writes the manifest of the shards under another name and renames it to `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        _write(unfinished, scans, relative_names(paths))
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
    columns = {name: Column(folder / f"{name}.npy", kind) for name, kind in kinds.items()}
    numbers = NumberColumns(folder)
    shards: list[dict[str, Any]] = []
    for number, (name, scan) in enumerate(zip(names, scans, strict=True)):
        columns["shard"].add(np.full(len(scan.keys), number))
        for kind, values in scan.columns.items():
            columns[kind].add(values)
        numbers.add(len(scan.keys), {side: _nan_for_0(scan.columns[side]) for side in SIDES} | scan.numbers)
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
    for column in columns.values():
        column.close()
    numbers.close()
    totals = sum((Counter(shard["problems"]) for shard in shards), Counter[str]())
    facts = {
        "version": VERSION,
        "samples": sum(shard["samples"] for shard in shards),
        "fingerprint": _digest([[s["name"], s["bytes"], s["samples"], s["keys"]] for s in shards]),
        "problems": {kind: totals[kind] for kind in PROBLEMS},
        "columns": numbers.names,
        "columns_left_out": sorted(numbers.left_out),
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(facts, indent=1))


def _nan_for_0(sides: NDArray[Any]) -> NDArray[np.float64]:
    return np.where(sides > 0, sides, np.nan)


def _table(manifest: Manifest) -> str:
    """The counts, and the shards with their problems."""
    rows: list[tuple[str, int]] = [
        ("shards", len(manifest.paths)),
        ("  damaged", len(manifest.damaged())),
        ("samples", len(manifest)),
    ]
    rows += [(f"  {kind}", count) for kind, count in manifest.problems.items()]
    lines = [f"{name:<22}{count:>12,}" for name, count in rows]
    lines.append(f"{'fingerprint':<22}{manifest.fingerprint[:12]:>12}")
    lines += [f"column {name}: {_coverage(manifest, name)}" for name in manifest.columns]
    lines += [f"{path}: {what}" for path, what in manifest.findings()[:20]]
    return "\n".join(lines) + "\n"


def _coverage(manifest: Manifest, name: str) -> str:
    """The number of samples that have the column, and its range."""
    column = manifest.column(name)
    count = int(np.isfinite(column).sum())
    bounds = f", {np.nanmin(column):g} to {np.nanmax(column):g}" if count else ""
    return f"{count:,} of {len(manifest):,}{bounds}"


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ldm.data.index SHARDS...`; status 1 where a shard has damage or left out samples, or none at all."""
    parser = argparse.ArgumentParser(prog="python -m ldm.data.index", description=__doc__)
    parser.add_argument("shards", nargs="+", help="a folder, a pattern like data/{00000..00127}.tar, files")
    parser.add_argument("--out", help="where to keep the manifest (default: .index next to local shards)")
    parser.add_argument("--deadline-s", type=float, default=300.0, help="how long to retry remote shards (300)")
    options = parser.parse_args(arguments)
    try:
        remote = Remote(deadline_s=options.deadline_s)
        manifest = index_shards(options.shards, options.out, progress=True, remote=remote)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(_table(manifest))
    problems = any(manifest.problems[kind] for kind in (*DAMAGE, *LEFT_OUT))
    return 1 if problems or not len(manifest) else 0
