"""Tables and plots: what they say, what they refuse, that files appear."""

import csv
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
        row("pictures", None, {"all": Value(1.0, 0.9, 1.0)}),
        row("reconstructions", None, {"psnr_db": Value(31.234, 31.1, 31.4), "Frechet(x)": Value(0.5, 0.4, 0.6)}),
        row("samples", 3.0, {"all": Value(0.8512, 0.8, 0.9), "Frechet(x)": Value(123.4, 120.0, 126.0)}),
        row("samples", 1.5, {"all": Value(0.7, 0.6, 0.8), "Frechet(x)": Value(12.345)}),
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


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("n_images", 11), ("weights", "v"), ("ema", False)])
def test_other_protocols_share_no_table(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        rows_table([*rows(), row("samples", 5.0, {"all": Value(0.5)}, **{name: value})])


def test_the_plot_of_the_scales_is_written(tmp_path: Path) -> None:
    plot_scales(rows(), tmp_path / "scales.png")
    with Image.open(tmp_path / "scales.png") as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24) or []) > 50
    plot_scales(rows()[:2], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def write_log(path: Path, lines: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train/loss", "val/loss", "val/psnr", "train/kl"])
        writer.writeheader()
        writer.writerows(lines)


def test_a_later_attempt_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    stage = tmp_path / "base"
    write_log(
        stage / "logs/attempt_0/metrics.csv",
        [{"step": step, "train/loss": 10.0 + step, "train/kl": 1.0} for step in range(6)]
        + [{"step": 5, "val/loss": 3}],
    )
    write_log(stage / "logs/attempt_1/metrics.csv", [{"step": step, "train/loss": float(step)} for step in (4, 6, 8)])
    curves = _curves(stage)
    assert curves["loss"]["train"] == {0: 10, 1: 11, 2: 12, 3: 13, 4: 4, 6: 6, 8: 8}
    assert curves["loss"]["val"] == {5: 3.0} and set(curves) == {"loss"}


def test_the_plot_of_the_curves_is_written_for_several_stages(tmp_path: Path) -> None:
    for stage, metric in (("first_stage", "val/psnr"), ("base", "val/loss")):
        lines = [{"step": step, "train/loss": 1 / (1 + step)} for step in range(60)] + [{"step": 59, metric: 0.5}]
        write_log(tmp_path / stage / "logs/attempt_0/metrics.csv", lines)
    plot_curves(tmp_path, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1200  # three panels in a row
    plot_curves(tmp_path / "nowhere", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_average_does_not_lag() -> None:
    line = [float(i) for i in range(20)]
    assert _average(line, 5) == pytest.approx(line)
    assert _average([0.0, 3.0, 0.0], 1) == [0.0, 1.0, 0.0]


def test_the_stages_are_told() -> None:
    records = [
        {"stage": "first_stage", "step": 100, "train_seconds": 12.6, "psnr_db": 30.04},
        {"stage": "base", "step": 2000, "train_seconds": 100.0},
    ]
    assert cells(stages_table(records))[1:] == [
        ["first_stage", "100", "13", "reconstruction 30.0 dB"],
        ["base", "2000", "100", ""],
    ]
