"""What there is to pack: pictures with their captions, from a folder, a table or shards."""

import csv
import hashlib
import importlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm.data.shards.packable import Encode, Packable, as_json, member_bytes, picture_facts
from ldm.data.shards.reshard import is_shards, read_shards
from ldm.data.shards.tar import IMAGE_KINDS
from ldm.errors import UserError

Captioner = Callable[[str], str | None]
TABLES = (".csv", ".jsonl", ".parquet")
FACTS_bytes = 200  # of a JSON part: width, height, sha256 and their names
PARQUET_rows = 10_000  # read at a time


@dataclass(frozen=True)
class Entry:
    """A picture file with its caption, and what else is known of it."""

    path: str
    key: str
    caption: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def tar_bytes(self) -> int:
        described = len(json.dumps(self.facts)) + 2 * len(self.caption.encode()) + FACTS_bytes
        return sum(member_bytes(self.key, size) for size in (os.path.getsize(self.path), described, described))

    def identity(self) -> list[Any]:
        return [self.key, self.caption, self.facts]

    def parts(self, encode: Encode, touched: bool) -> dict[str, bytes]:
        stored, extension, size = encode(Path(self.path).read_bytes())
        facts = self.facts | {"caption": self.caption} | picture_facts(stored, size)
        return {extension: stored, "txt": self.caption.encode(), "json": as_json(facts)}


def read_source(
    source: str | Path, caption_from: str | None = None, allow_damaged: bool = False
) -> tuple[list[Packable], Counter[str]]:
    """The samples of a folder, a table or shards, and how many were left out by reason.

    Those of a folder or table are sorted by key, those of shards stay in their order. Raises UserError where there
    is no such source, the table lacks a column or a file, the function fails, or a shard is damaged.
    """
    if is_shards(source):
        if caption_from:
            raise UserError(f"{source} has its own captions; --caption-from is for a folder of pictures")
        return read_shards(source, allow_damaged)
    source = Path(source)
    captioner = _captioner(caption_from) if caption_from else None
    if source.is_dir():
        found = _folder(source, captioner)
    elif source.suffix in TABLES and source.is_file():
        if captioner:
            raise UserError(f"{source} has its own captions; --caption-from is for a folder")
        found = _table(source)
    else:
        raise UserError(f"{source} is no folder and no {', '.join(TABLES)} table or .tar shards that are there")
    left_out: Counter[str] = Counter()
    entries = []
    for entry in found:
        if entry.caption:
            entries.append(entry)
        else:
            left_out["without caption"] += 1
    return [*sorted(_unique(entries), key=lambda entry: entry.key)], left_out


def _captioner(name: str) -> Captioner:
    """The function that `module:function` names."""
    module, _, function = name.partition(":")
    if not function:
        raise UserError(f"--caption-from takes module:function, got {name}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--caption-from {name} is not to be found: {error}") from error
    if not callable(found):
        raise UserError(f"--caption-from {name} is no function")
    return found  # type: ignore[no-any-return]


def _folder(root: Path, captioner: Captioner | None) -> Iterator[Entry]:
    """Every picture below a folder; the caption is empty where there is none."""
    for folder, below, files in os.walk(root):
        below.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix[1:].lower() not in IMAGE_KINDS or name.startswith("."):
                continue
            key = path.relative_to(root).with_suffix("").as_posix()
            if captioner:
                yield Entry(str(path), key, (captioner(str(path)) or "").strip())
            else:
                yield Entry(str(path), key, *_beside(path))


def _beside(path: Path) -> tuple[str, dict[str, Any]]:
    """(caption, facts) of the text and JSON beside a picture."""
    facts: dict[str, Any] = {}
    described, text = path.with_suffix(".json"), path.with_suffix(".txt")
    if described.is_file():
        try:
            facts = json.loads(described.read_text())
        except ValueError as error:
            raise UserError(f"{described} is no JSON: {error}") from error
        if not isinstance(facts, dict):
            raise UserError(f"{described} is no JSON object")
    caption = text.read_text(errors="replace") if text.is_file() else facts.get("caption")
    return (caption.strip() if isinstance(caption, str) else ""), facts


def _table(table: Path) -> Iterator[Entry]:
    """The rows of a table; every further column is kept."""
    for number, row in enumerate(_rows(table), 1):
        lacking = [column for column in ("path", "caption") if column not in row]
        if lacking:
            raise UserError(f"{table}, row {number} lacks {' and '.join(lacking)}; it has {', '.join(row)}")
        path = table.parent / str(row["path"])
        if not path.is_file():
            raise UserError(f"{table}, row {number}: {path} does not exist; paths are relative to the table")
        facts = {name: value for name, value in row.items() if name not in ("path", "caption", None)}
        yield Entry(str(path), str(Path(row["path"]).with_suffix("")), str(row["caption"] or "").strip(), facts)


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    if table.suffix == ".parquet":
        yield from _parquet_rows(table)
        return
    with table.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file) if table.suffix == ".csv" else _json_rows(file, table)


def _parquet_rows(table: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{table} needs pyarrow: pip install 'ldm[parquet]', or write it as .csv or .jsonl") from error
    try:
        batches = parquet.ParquetFile(table).iter_batches(PARQUET_rows)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise UserError(f"{table} is no Parquet table: {error}") from error
    for batch in batches:
        yield from batch.to_pylist()


def _json_rows(lines: Iterator[str] | Any, table: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{table}, line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{table}, line {number} is no JSON object")
            yield row


def _unique(entries: list[Entry]) -> list[Entry]:
    """The entries with keys without dots and folders; keys that became equal get a hash of the path."""
    plain = [re.sub(r"[^\w-]", "_", entry.key) for entry in entries]
    often = Counter(plain)
    keyed = []
    for entry, key in zip(entries, plain, strict=True):
        if often[key] > 1:
            key += "_" + hashlib.sha256(f"{entry.key}\0{Path(entry.path).suffix}".encode()).hexdigest()[:8]
        keyed.append(replace(entry, key=key))
    if len({entry.key for entry in keyed}) < len(keyed):
        twice = next(key for key, count in Counter(entry.key for entry in keyed).items() if count > 1)
        raise UserError(f"the picture that becomes {twice} is listed more than once; list each once")
    return keyed
