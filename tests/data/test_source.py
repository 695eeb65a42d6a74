import datetime
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ldm.data.shards.pack_source import read_source
from ldm.data.shards.packing import Packing
from ldm.errors import UserError
from tests.data.make import picture


def length(path: str) -> str | None:
    """A captioner for the tests."""
    return None if "leave" in path else f"name of {len(Path(path).stem)} letters"


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            path.write_bytes(picture(len(name)))
        else:
            path.write_text(text)
    return folder


def test_a_folder_has_captions_beside_its_pictures(tmp_path: Path) -> None:
    described = json.dumps({"caption": "json words", "punsafe": 0.1})
    fill(
        tmp_path,
        {"b/x.png": "", "b/x.txt": " words\n", "a.png": "", "a.json": described, "alone.png": "", "n.md": ""},
    )
    entries, left_out = read_source(tmp_path)
    assert [(entry.key, entry.caption) for entry in entries] == [("a", "json words"), ("b_x", "words")]
    assert entries[0].facts["punsafe"] == 0.1
    assert left_out == {"without caption": 1}


def test_a_function_gives_captions(tmp_path: Path) -> None:
    fill(tmp_path, {"abc.png": "", "leave.png": ""})
    entries, left_out = read_source(tmp_path, f"{__name__}:length")
    assert [entry.caption for entry in entries] == ["name of 3 letters"]
    assert left_out == {"without caption": 1}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_names_paths_and_captions_and_more(tmp_path: Path, kind: str) -> None:
    rows = [
        {"path": "p/x.png", "caption": "a, b", "score": "5"},
        {"path": "y.png", "caption": "", "score": "6"},
    ]
    text = {
        "csv": 'path,caption,score\np/x.png,"a, b",5\ny.png,,6\n',
        "jsonl": "\n".join(map(json.dumps, rows)) + "\n\n",
    }[kind]
    fill(tmp_path, {"p/x.png": "", "y.png": "", f"table.{kind}": text})
    entries, left_out = read_source(tmp_path / f"table.{kind}")
    assert [(entry.key, entry.caption, entry.facts) for entry in entries] == [("p_x", "a, b", {"score": "5"})]
    assert left_out == {"without caption": 1}


def test_keys_have_no_dots_and_equal_ones_are_told_apart(tmp_path: Path) -> None:
    fill(tmp_path, {f"{name}.png": "" for name in ("a.b", "a_b", "c d")})
    first = [entry.key for entry in read_source(tmp_path, f"{__name__}:length")[0]]
    assert first[2] == "c_d" and len(set(first)) == 3 and all("." not in key for key in first)
    assert first == [entry.key for entry in read_source(tmp_path, f"{__name__}:length")[0]]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("t.csv", "file,caption\nx.png,words\n", "row 1 lacks path; it has file, caption"),
        ("t.csv", "path,caption\nnone.png,words\n", "none.png does not exist"),
        ("t.jsonl", "{no json\n", "line 1 is not JSON"),
        ("t.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("t.csv", "path,caption\nx.png,one\nx.png,two\n", "listed more than once"),
        ("t.txt", "", "not a folder, a .csv, .jsonl, .parquet table"),
        ("t.parquet", "words", "needs pyarrow|not a Parquet table"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path: Path, name: str, text: str, told: str) -> None:
    fill(tmp_path, {"x.png": "", name: text})
    with pytest.raises(UserError, match=told):
        read_source(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["nocolon", "no.module:f", "ldm.data.shards.pack_source:nothing", "ldm.data.shards.pack_source:UserError.x"]
)
def test_functions_that_are_not_there_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--caption-from"):
        read_source(tmp_path, name)


def parquet(table: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A Parquet table, or where pyarrow is not there a stand-in for its reader."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        batches = [SimpleNamespace(to_pylist=lambda part=rows[i : i + 1]: part) for i in range(len(rows))]
        reader = SimpleNamespace(ParquetFile=lambda path: SimpleNamespace(iter_batches=lambda count: iter(batches)))
        monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=reader))
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", reader)
        table.touch()
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), table)


def test_a_parquet_table_is_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"x.png": "", "y.png": ""})
    when = datetime.date(2026, 1, 2)
    rows = [{"path": "y.png", "caption": "two", "score": 6.5, "day": when}, {"path": "x.png", "caption": None}]
    parquet(tmp_path / "t.parquet", rows, monkeypatch)
    entries, left_out = read_source(tmp_path / "t.parquet")
    assert left_out == {"without caption": 1} and entries[0].facts == {"score": 6.5, "day": when}
    described = json.loads(entries[0].parts(Packing())["json"])
    assert (described["score"], described["day"], described["height"]) == (6.5, "2026-01-02", 16)


def test_a_parquet_table_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'ldm\[parquet\]'"):
        read_source(tmp_path / "t.parquet")
