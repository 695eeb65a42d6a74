"""Columns of a manifest as .npy files that grow shard by shard, so that memory holds one shard's at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

MAX_columns = 256
PADDING = 1 << 20  # entries of NaN that are written at a time


class Column:
    """A one-dimensional .npy file that grows; its header is rewritten once the length is known."""

    def __init__(self, path: Path, kind: type[np.generic]) -> None:
        self.file: BinaryIO = path.open("wb")
        self.kind = np.dtype(kind)
        self.length = 0
        self._header()

    def _header(self) -> None:
        """NumPy leaves room for any length of the first axis, so the header's size does not change."""
        facts = {"descr": npy.dtype_to_descr(self.kind), "fortran_order": False, "shape": (self.length,)}
        npy.write_array_header_1_0(self.file, facts)

    def add(self, values: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(values, self.kind).tobytes())
        self.length += len(values)

    def pad(self, length: int) -> None:
        """Fills up with NaN to a length."""
        while (missing := length - self.length) > 0:
            self.add(np.full(min(missing, PADDING), np.nan))

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()


class NumberColumns:
    """Columns of float64 by any name, of which each shard has some; only the first MAX_columns names are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.length = 0
        self.left_out: set[str] = set()
        self._columns: dict[str, Column] = {}

    @property
    def names(self) -> list[str]:
        """In the order of their files, see `number_file`."""
        return list(self._columns)

    def add(self, count: int, numbers: Mapping[str, NDArray[np.float64]]) -> None:
        """The next `count` samples."""
        for name, values in numbers.items():
            column = self._columns.get(name)
            if column is None:
                if len(self._columns) == MAX_columns:
                    self.left_out.add(name)
                    continue
                column = Column(number_file(self.folder, len(self._columns)), np.float64)
                self._columns[name] = column
            column.pad(self.length)
            column.add(values)
        self.length += count

    def close(self) -> None:
        for column in self._columns.values():
            column.pad(self.length)
            column.close()


def number_file(folder: Path, place: int) -> Path:
    """The file of the numeric column at a place of the manifest's list; names may have any character."""
    return folder / f"number_{place}.npy"
