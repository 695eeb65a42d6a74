"""docs/reading.md lists files that exist, with line counts near the true ones."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_files_and_line_counts() -> None:
    rows = re.findall(r"^\| \d+ \| `(\S+)` \| (\d+) \|", (ROOT / "docs/reading.md").read_text(), re.M)
    assert len(rows) == 14
    for file, lines in rows:
        count = len((ROOT / file).read_text().splitlines())
        assert count == pytest.approx(int(lines), rel=0.1, abs=5), file
