"""The prompts of a command: one, or a file of them, each with knobs of its own."""

import json
from pathlib import Path
from typing import Any

from ldm.errors import UserError

Line = dict[str, Any]
"""The knobs of one prompt, `prompt` itself among them."""


def read_prompts(prompt: str | None, prompts: str | None) -> list[Line]:
    """The prompts: the one that is given, or those of a file; UserError for none or both.

    A file has one prompt a line, a `.jsonl` file one object a line: {"prompt": "...", "seed": 3, "steps": 20}.
    """
    if (prompt is None) == (prompts is None):
        raise UserError('give either prompt="..." or prompts=FILE (one prompt a line, or .jsonl)')
    if prompt is not None:
        return [{"prompt": str(prompt)}]
    path = Path(str(prompts))
    if not path.is_file():
        raise UserError(f"prompts={path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"prompts={path}: this is no text in UTF-8 ({error.reason})") from error
    read = _object if path.suffix == ".jsonl" else _text
    found = [read(f"{path}, line {i}", line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not found:
        raise UserError(f"prompts={path}: the file has no prompts; write one a line")
    return found


def _text(where: str, line: str) -> Line:
    return {"prompt": line.strip()}


def _object(where: str, line: str) -> Line:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"prompts={where}: this is no JSON ({error}); write an object a line") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise UserError(
            f'prompts={where}: expected an object with a text, e.g. {{"prompt": "a red circle", "seed": 3}}'
        )
    return found
