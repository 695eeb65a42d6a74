"""The samples to pack: pictures with their captions, from a folder, a table or shards."""

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

from ldm.data.shards.packing import Packable, Packing, as_json, member_bytes
from ldm.data.shards.reshard import is_shards, read_shards
from ldm.data.shards.tar import IMAGE_KINDS
from ldm.errors import UserError

Captioner = Callable[[str], str | None]
TABLES = (".csv", ".jsonl", ".parquet")
FACTS_bytes = 200  # of a JSON part: width, height, sha256 and their names
PARQUET_rows = 10_000  # read at a time


@dataclass(frozen=True)
class PictureFile(Packable):
    """A picture file with its caption, and further facts for its JSON."""

    caption: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def tar_bytes(self) -> int:
        json_bytes = len(json.dumps(self.facts)) + 2 * len(self.caption.encode()) + FACTS_bytes
        return sum(member_bytes(self.key, size) for size in (os.path.getsize(self.path), json_bytes, json_bytes))

    def identity(self) -> list[Any]:
        return [self.key, self.caption, self.facts]

    def parts(self, packing: Packing) -> dict[str, bytes]:
        data, extension, picture = packing.encode(Path(self.path).read_bytes())
        facts = self.facts | {"caption": self.caption} | picture
        return {extension: data, "txt": self.caption.encode(), "json": as_json(facts)}


def read_source(
    source: str | Path, caption_from: str | None = None, allow_damaged: bool = False
) -> tuple[list[Packable], Counter[str]]:
    """The samples of a folder, a table or shards, and the number left out by reason.

    Those of a folder or table are sorted by key, those of shards stay in their order. Raises UserError where the
    source does not exist, the table lacks a column or a file, the function fails, or a shard is damaged.
    """
    if is_shards(source):
        if caption_from:
            raise UserError(f"{source} has its own captions; --caption-from is for a folder of pictures")
        return read_shards(source, allow_damaged)
    source = Path(source)
    captioner = _captioner(caption_from) if caption_from else None
    if source.is_dir():
        pictures = [*_folder(source, captioner)]
    elif source.suffix in TABLES and source.is_file():
        if captioner:
            raise UserError(f"{source} has its own captions; --caption-from is for a folder")
        pictures = [*_table(source)]
    else:
        raise UserError(f"{source} is not a folder, a {', '.join(TABLES)} table or existing .tar shards")
    captioned = [picture for picture in pictures if picture.caption]
    left_out = Counter({"without caption": len(pictures) - len(captioned)})
    return [*sorted(_unique(captioned), key=lambda picture: picture.key)], +left_out


def _captioner(name: str) -> Captioner:
    """The function that `module:function` names."""
    module, _, function = name.partition(":")
    if not function:
        raise UserError(f"--caption-from takes module:function, got {name}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        captioner = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--caption-from {name} is not found: {error}") from error
    if not callable(captioner):
        raise UserError(f"--caption-from {name} is not a function")
    return captioner  # type: ignore[no-any-return]


def _folder(root: Path, captioner: Captioner | None) -> Iterator[PictureFile]:
    """Every picture below a folder; the caption is empty where there is none."""
    for folder, below, files in os.walk(root):
        below.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix[1:].lower() not in IMAGE_KINDS or name.startswith("."):
                continue
            key = path.relative_to(root).with_suffix("").as_posix()
            caption, facts = ((captioner(str(path)) or "").strip(), {}) if captioner else _sidecars(path)
            yield PictureFile(str(path), key, caption=caption, facts=facts)


def _sidecars(path: Path) -> tuple[str, dict[str, Any]]:
    """(caption, facts) of the text and JSON next to a picture."""
    text, description = path.with_suffix(".txt"), path.with_suffix(".json")
    facts = _json_object(description.read_text(), str(description)) if description.is_file() else {}
    caption = text.read_text(errors="replace") if text.is_file() else facts.get("caption")
    return (caption.strip() if isinstance(caption, str) else ""), facts


def _json_object(text: str, name: str) -> dict[str, Any]:
    """The facts in a text; `name` is for the error."""
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise UserError(f"{name} is not a JSON object")
    return facts


def _table(table: Path) -> Iterator[PictureFile]:
    """The rows of a table; further columns go into the JSON."""
    for number, row in enumerate(_rows(table), 1):
        if missing := [column for column in ("path", "caption") if column not in row]:
            raise UserError(f"{table}, row {number} lacks {' and '.join(missing)}; it has {', '.join(row)}")
        path = table.parent / str(row["path"])
        if not path.is_file():
            raise UserError(f"{table}, row {number}: {path} does not exist; paths are relative to the table")
        facts = {name: value for name, value in row.items() if name not in ("path", "caption", None)}
        key, caption = str(Path(row["path"]).with_suffix("")), str(row["caption"] or "").strip()
        yield PictureFile(str(path), key, caption=caption, facts=facts)


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    if table.suffix == ".parquet":
        yield from _parquet_rows(table)
        return
    with table.open(newline="", encoding="utf-8") as file:
        if table.suffix == ".csv":
            yield from csv.DictReader(file)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_object(line, f"{table}, line {number}")


def _parquet_rows(table: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{table} needs pyarrow: pip install 'ldm[parquet]', or write it as .csv or .jsonl") from error
    try:
        batches = parquet.ParquetFile(table).iter_batches(PARQUET_rows)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise UserError(f"{table} is not a Parquet table: {error}") from error
    for batch in batches:
        yield from batch.to_pylist()


def _unique(pictures: list[PictureFile]) -> list[PictureFile]:
    """The pictures with keys without dots and folders; keys that became equal get a hash of the path."""
    keys = [re.sub(r"[^\w-]", "_", picture.key) for picture in pictures]
    counts = Counter(keys)
    for i, picture in enumerate(pictures):
        if counts[keys[i]] > 1:
            keys[i] += "_" + hashlib.sha256(f"{picture.key}\0{Path(picture.path).suffix}".encode()).hexdigest()[:8]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise UserError(f"the picture that becomes {twice[0]} is listed more than once; list each once")
    return [replace(picture, key=key) for picture, key in zip(pictures, keys, strict=True)]
