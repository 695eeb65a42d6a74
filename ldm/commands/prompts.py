"""Files of prompts: one a line, or one JSON object a line with knobs of that prompt alone."""

import json
from pathlib import Path
from typing import Any

from ldm.errors import UserError

Line = dict[str, Any]
"""The knobs of one prompt, `prompt` itself among them."""


def read_prompts(path: Path) -> list[Line]:
    """The prompts of a file; UserError where it cannot be read or has none.

    A text file has one prompt a line, a `.jsonl` file one object a line: {"prompt": "...", "seed": 3, "steps": 20}.
    """
    if not path.is_file():
        raise UserError(f"prompts={path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"prompts={path}: this is not a text in UTF-8 ({error.reason})") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise UserError(f"prompts={path}: the file has no prompts; write one a line")
    if path.suffix != ".jsonl":
        return [{"prompt": line.strip()} for _, line in lines]
    return [_object(f"prompts={path}, line {number}", line) for number, line in lines]


def _object(where: str, line: str) -> Line:
    try:
        knobs = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: this is not JSON ({error}); write an object a line") from error
    if not isinstance(knobs, dict) or not isinstance(knobs.get("prompt", ""), str):
        raise UserError(f'{where}: expected an object with a text, e.g. {{"prompt": "a red circle", "seed": 3}}')
    return knobs
