"""The numbers in the JSON parts of a shard, as columns."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

WORDS = frozenset({"caption", "key"})  # text, even where it looks like a number
SIDES = ("width", "height")  # these have separate columns
MISSING = frozenset({"", "null", "none", "nan", "n/a"})
LARGE = 1 << 62  # an integer beyond this may have no float
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def number(value: object) -> float:
    """A JSON value as a number: true and false as 1 and 0, a string that spells one; NaN for anything else."""
    try:
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
            return float(value)
    except OverflowError:  # an integer beyond 1e308
        pass
    return float("nan")


class Numbers:
    """Columns of the numbers at the top level of JSON objects that are added one by one.

    A string that spells a number counts as one where every string of that name in the shard does or is empty.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._spelled: dict[str, dict[int, float]] = {}
        self._texts = set(WORDS)

    def add(self, facts: Mapping[str, object]) -> None:
        """The next row."""
        row: dict[str, float] = {}
        for name, value in facts.items():
            kind = type(value)
            if kind is float or kind is bool:
                row[name] = value  # type: ignore[assignment]
            elif kind is int:
                row[name] = value if -LARGE < value < LARGE else number(value)  # type: ignore[assignment,operator]
            elif kind is str and name not in self._texts:
                self._string(name, value)  # type: ignore[arg-type]
        self.rows.append(row)

    def _string(self, name: str, text: str) -> None:
        if NUMBER.fullmatch(text.strip()):
            self._spelled.setdefault(name, {})[len(self.rows)] = float(text)
        elif text.strip().lower() not in MISSING:
            self._texts.add(name)
            self._spelled.pop(name, None)

    def columns(self, numbers: Sequence[int]) -> dict[str, NDArray[np.float64]]:
        """The columns by name for the rows `numbers`; NaN where a row lacks the name."""
        for name, spelled in self._spelled.items():
            for row, value in spelled.items():
                self.rows[row].setdefault(name, value)
        rows = [self.rows[i] for i in numbers]
        names = {name: None for row in rows for name in row if name not in SIDES and name not in WORDS}
        absent = float("nan")
        return {name: np.array([row.get(name, absent) for row in rows], np.float64) for name in names}
