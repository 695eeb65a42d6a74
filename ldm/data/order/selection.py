"""Which samples of each source a run uses, bucket by bucket, after filters and buckets.

The numbers of the samples are in `selections/` in the manifest's folder, memory-mapped, so that a selection of 100
million samples costs a process no memory; it is written once and read by every process.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from ldm.checkpoint import write_atomic
from ldm.data.order.buckets import Buckets, Size, Table, edges
from ldm.data.order.filters import CHUNK, Filter, Mask, RuleCount, count_rules
from ldm.data.shards.index import Manifest
from ldm.errors import UserError

Ints = NDArray[np.int64]

SIZE_KNOWN = "width and height are known"


@dataclass(frozen=True)
class SelectionRequest:
    """A manifest and the filter of its samples; `name` is for messages."""

    name: str
    manifest: Manifest
    where: Filter | None = None


class Selection:
    """The selected samples of a manifest, by place: those of the first bucket in manifest order, then the second's.

    counts  samples of each bucket
    rules   counts of the filter's rules, in order
    """

    def __init__(self, counts: Sequence[int], rules: Sequence[RuleCount] = (), members: Path | None = None) -> None:
        self.counts = list(counts)
        self.rules = list(rules)
        self._path = members  # None: all of them
        self._members: NDArray[Any] | None = np.load(members, mmap_mode="r") if members else None

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, place: int) -> int:
        """The number in the manifest of the sample at a place."""
        return place if self._members is None else int(self._members[place])

    def within(self, first: int, stop: int) -> tuple[Ints, Ints]:
        """(numbers, buckets) of the samples from number `first` to before `stop`, bucket by bucket."""
        if self._members is None:
            return np.arange(first, stop), np.zeros(stop - first, np.int64)
        ends = np.cumsum(self.counts)
        parts = [self._members[end - count : end] for end, count in zip(ends, self.counts, strict=True)]
        within = [part[slice(*np.searchsorted(part, [first, stop]))] for part in parts]
        buckets = [np.full(len(part), bucket) for bucket, part in enumerate(within)]
        return np.concatenate(within).astype(np.int64), np.concatenate(buckets)

    def __reduce__(self) -> tuple[type["Selection"], tuple[list[int], list[RuleCount], Path | None]]:
        return Selection, (self.counts, self.rules, self._path)


def select(
    sources: Sequence[SelectionRequest],
    buckets: Buckets | None = None,
    size: Size = (1, 1),
    minimum: int = 1,
    weights: Sequence[float] | None = None,
) -> tuple[list[Size], list[Selection]]:
    """(sizes of the buckets, the selection of each source); without buckets there is the one size.

    Each bucket needs `minimum` samples. Raises UserError for filters that don't fit the columns or keep
    nothing, and for buckets that nothing fits.
    """
    wanted = buckets.sizes(size) if buckets else [size]
    table = Table(wanted, weights)
    counted = [_counted(source, table if buckets else None) for source in sources]
    for source, (rules, counts) in zip(sources, counted, strict=True):
        if not counts.sum():
            lines = "\n".join(f"  {rule.rule}: {rule.dropped} dropped, {rule.kept} kept" for rule in rules)
            raise UserError(f"{source.name}: no sample is left of {len(source.manifest)}:\n{lines}\nchange these rules")
    table.counts = [counts for _, counts in counted]
    sizes = buckets.choose(table, minimum) if buckets else wanted
    samples = table.samples([wanted.index(each) for each in sizes])
    return sizes, [
        _selection(source, rules, samples[d].tolist(), sizes if buckets else None)
        for d, (source, (rules, _)) in enumerate(zip(sources, counted, strict=True))
    ]


def _chunks(source: SelectionRequest, with_size: bool) -> Iterator[tuple[int, list[Mask], NDArray[np.float64]]]:
    """(start, the mask of each rule, log aspect ratios) of the samples, a chunk at a time."""
    manifest, where = source.manifest, source.where
    columns = where.resolve(manifest) if where else {}
    for start in range(0, len(manifest), CHUNK):
        stop = min(start + CHUNK, len(manifest))
        masks = where.masks(manifest, columns, start, stop) if where else []
        ratios = np.zeros(0)
        if with_size:
            with np.errstate(all="ignore"):
                ratios = np.log(manifest.column("height")[start:stop] / manifest.column("width")[start:stop])
            masks.append(np.isfinite(ratios))
        yield start, masks, ratios


def _counted(source: SelectionRequest, table: Table | None) -> tuple[list[RuleCount], Ints]:
    """The counts of the rules, and of the kept samples between the table's edges (without a table: of all)."""
    names = [*(source.where.rules if source.where else []), *([SIZE_KNOWN] if table else [])]
    if not names:
        return [], np.array([len(source.manifest)])
    path = _file(source, "counts", table.sizes if table else None).with_suffix(".json")
    if not path.is_file():
        passed = np.zeros(len(names) + 1, np.int64)
        counts = np.zeros(len(table.edges) + 1 if table else 1, np.int64)
        for _, masks, ratios in _chunks(source, table is not None):
            here = np.ones(len(masks[0]), np.bool_)
            passed[0] += len(here)
            for i, mask in enumerate(masks, 1):
                here &= mask
                passed[i] += here.sum()
            counts += table.count(ratios[here]) if table else here.sum()
        with _writing(path) as temporary:
            temporary.write_text(json.dumps({"passed": passed.tolist(), "counts": counts.tolist()}))
    facts = json.loads(path.read_text())
    return count_rules(names, facts["passed"]), np.array(facts["counts"])


def _selection(
    source: SelectionRequest, rules: list[RuleCount], counts: list[int], sizes: list[Size] | None
) -> Selection:
    if not rules:
        return Selection(counts)
    path = _file(source, "members", sizes).with_suffix(".npy")
    if not path.is_file():
        with _writing(path) as temporary:
            _write_members(temporary, source, counts, sizes)
    return Selection(counts, rules, path)


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """`write_atomic`, with a UserError where the folder cannot be written."""
    try:
        with write_atomic(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot keep the selection in {path.parent} ({error}); give index=FOLDER") from error


def _write_members(path: Path, source: SelectionRequest, counts: list[int], sizes: list[Size] | None) -> None:
    kind = np.int32 if len(source.manifest) < 1 << 31 else np.int64
    members = open_memmap(path, "w+", kind, (sum(counts),))
    cuts = edges(sizes) if sizes else np.zeros(0)
    ends = np.cumsum(counts) - counts
    for start, masks, ratios in _chunks(source, sizes is not None):
        chosen = np.flatnonzero(np.logical_and.reduce(masks))
        bucket = np.searchsorted(cuts, ratios[chosen], side="right") if sizes else np.zeros(len(chosen), np.int64)
        for number in np.unique(bucket):
            part = chosen[bucket == number] + start
            members[ends[number] : ends[number] + len(part)] = part
            ends[number] += len(part)
    members.flush()


def _file(source: SelectionRequest, what: str, sizes: list[Size] | None) -> Path:
    where = source.where
    facts = [where.text, where.resolve(source.manifest)] if where else []
    digest = hashlib.blake2b(json.dumps([facts, sizes]).encode(), digest_size=8).hexdigest()
    return source.manifest.folder / "selections" / f"{what}-{digest}"
