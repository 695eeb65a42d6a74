"""Tables and plots: what they say, what they refuse, that files appear."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.evaluation.evaluate import Row
from ldm.evaluation.protocol import Protocol, Result, Value
from ldm.evaluation.report import _average, _curves, plot_curves, plot_scales, rows_table, stages_table

METRICS = {"Frechet(x)": "x@1"}


def row(source: str, scale: float | None, values: dict[str, Value], **changes: Any) -> Row:
    protocol = Protocol(
        **{
            "task": source, "reference": "r", "prompts": "p", "weights": "w", "ema": True, "n_images": 10,
            "metrics": METRICS, "seed": 0, "size": (8, 8), "guidance_scale": scale, "sampler": "ddim",
        }
        | changes
    )  # fmt: skip
    return Row("val", source, Result(protocol, values), ["a"], torch.zeros(1, 3, 8, 8))


def rows() -> list[Row]:
    return [
        row("pictures", None, {"all": Value(1.0, 0.9, 1.0, "share")}),
        row("reconstructions", None, {"psnr_db": Value(31.234, 31.1, 31.4), "Frechet(x)": Value(0.5, 0.4, 0.6)}),
        row("samples", 3.0, {"all": Value(0.8512, 0.8, 0.9, "share"), "Frechet(x)": Value(123.4, 120.0, 126.0)}),
        row("samples", 1.5, {"all": Value(0.7, 0.6, 0.8, "share"), "Frechet(x)": Value(12.345)}),
    ]


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if not line.startswith("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_says_each_value_once_with_its_interval() -> None:
    header, *body = cells(rows_table(rows()))
    assert header == ["set", "n", "of", "all", "psnr_db", "Frechet(x)"]
    assert body[0] == ["val", "10", "pictures", "100.0 % (90.0 to 100.0)", "", ""]
    assert body[1][3:] == ["", "31.23 (31.10 to 31.40)", "0.500 (0.400 to 0.600)"]
    assert body[2] == ["val", "10", "guidance 3", "85.1 % (80.0 to 90.0)", "", "123.4 (120.0 to 126.0)"]
    assert body[3][5] == "12.35" or body[3][5] == "12.34"


def test_a_distance_below_one_is_no_share() -> None:
    assert "%" not in cells(rows_table(rows()))[2][5]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (-0.000567, "-0.000567"), (0.5678, "0.568"), (0.0, "0.000"), (1e-9, "0.000000")],
)
def test_a_small_distance_keeps_three_digits(value: float, text: str) -> None:
    table = rows_table([row("samples", 3.0, {"KID": Value(value)})])
    assert cells(table)[1][3] == text


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("n_images", 11), ("weights", "v"), ("ema", False)])
def test_other_protocols_share_no_table(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        rows_table([*rows(), row("samples", 5.0, {"all": Value(0.5)}, **{name: value})])


def test_the_plot_of_the_scales_is_written(tmp_path: Path) -> None:
    assert plot_scales(rows(), tmp_path / "scales.png") == [tmp_path / "scales.png"]
    with Image.open(tmp_path / "scales.png") as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24) or []) > 50
    assert plot_scales(rows()[:2], tmp_path / "none.png") == []
    assert not (tmp_path / "none.png").exists()


def write_log(path: Path, lines: list[dict[str, float | None]]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps({"time": 1e9 + number} | line) + "\n" for number, line in enumerate(lines)))


def test_the_later_of_two_values_at_a_step_counts_and_a_line_cut_off_does_not(tmp_path: Path) -> None:
    log = tmp_path / "base" / "metrics.jsonl"
    lines: list[dict[str, float | None]] = [
        {"step": step, "train/loss": 10.0 + step, "train/kl": 1.0} for step in range(3)
    ]
    write_log(
        log, [*lines, {"step": 2, "val/loss": 3}, {"step": 2, "train/loss": 4.0}, {"step": 3, "train/loss": None}]
    )
    with log.open("a") as file:
        file.write('{"step": 4, "train/lo')
    curves = _curves(tmp_path / "base")
    assert curves["loss"] == {"train": {0: 10.0, 1: 11.0, 2: 4.0}, "val": {2: 3.0}}
    assert set(curves) == {"loss"}


def test_the_plot_of_the_curves_is_written_for_several_stages(tmp_path: Path) -> None:
    for stage, metric in (("first_stage", "val/psnr"), ("base", "val/loss")):
        lines = [{"step": step, "train/loss": 1 / (1 + step)} for step in range(60)] + [{"step": 59, metric: 0.5}]
        write_log(tmp_path / stage / "metrics.jsonl", lines)
    assert plot_curves(tmp_path, tmp_path / "curves.png") == [tmp_path / "curves.png"]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1200  # three panels in a row
    assert plot_curves(tmp_path / "nowhere", tmp_path / "none.png") == []
    assert not (tmp_path / "none.png").exists()


def test_the_average_does_not_lag() -> None:
    line = [float(i) for i in range(20)]
    assert _average(line, 5) == pytest.approx(line)
    assert _average([0.0, 3.0, 0.0], 1) == [0.0, 1.0, 0.0]


def test_the_stages_are_listed() -> None:
    records = [
        {"stage": "first_stage", "step": 100, "train_seconds": 12.6, "psnr_db": 30.04},
        {"stage": "base", "step": 2000, "train_seconds": 100.0},
    ]
    assert cells(stages_table(records))[1:] == [
        ["first_stage", "100", "13", "reconstruction 30.0 dB"],
        ["base", "2000", "100", ""],
    ]
