"""The overrides of a command line: Hydra's grammar, and texts that are taken letter by letter."""

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from ldm.errors import UserError

QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides, parsed; UserError where one is not of the form name=value."""
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise UserError(f"{text!r}: expected name=value, for example experiment=quickstart")
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise UserError(f"an override can't be read: {first_line(error)}") from error


def quoted(text: str) -> str:
    """A text as an override's value that is taken letter by letter, commas, brackets and `${` as well."""
    text = re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", text)
    ends = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{ends}'"


def with_texts(overrides: Sequence[str], knobs: Sequence[str]) -> list[str]:
    """The overrides, with the values of these knobs taken literally, not as Hydra's grammar.

    A knob may end in `*` (`data.*.where`). Quoted values, empty ones and `null` keep their meaning. A brace pattern
    outside of a list (`data/{00000..00127}.tar`), which Hydra's grammar cannot read, is taken literally for every knob.
    """
    braces = re.compile(r"[^\[{'\"]*\{\w+\.\.\w+\}")
    patterns = [re.compile(re.escape(knob).replace(r"\*", r"[\w.]+")) for knob in knobs]
    result = []
    for override in overrides:
        name, _, value = override.partition("=")
        text = any(pattern.fullmatch(name) for pattern in patterns) or bool(braces.match(value))
        plain = text and value not in ("", "null") and not re.fullmatch(QUOTED, value)
        result.append(f"{name}={quoted(value)}" if plain else override)
    return result


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]
