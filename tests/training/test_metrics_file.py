"""The metrics file: valid JSON on every line, whole after a kill, each step once after a resume."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ldm.errors import UserError
from ldm.training.metrics_file import MetricsFile, Rewind, last_value
from tests.training.miniature import train


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> MetricsFile:
    found = MetricsFile(tmp_path / "stage" / "metrics.jsonl")
    for step in range(6):
        found.log_metrics({"train/loss": 0.5 * step, "epoch": 0}, step)
    return found


def test_a_line_holds_the_steps_done_the_time_and_the_values(file: MetricsFile) -> None:
    found = lines(file.path)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["train/loss"] for line in found] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert found[0].keys() == {"step", "time", "train/loss"}
    assert 0 < found[0]["time"] <= found[-1]["time"]


def test_numbers_that_json_does_not_have_are_null(file: MetricsFile) -> None:
    file.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e-30}, 6)
    assert {name: lines(file.path)[-1][name] for name in "abcd"} == {"a": None, "b": None, "c": None, "d": 1e-30}


def test_the_last_value_of_a_column_is_what_a_sweeper_gets(file: MetricsFile) -> None:
    file.log_metrics({"val/loss": 0.25}, 5)
    file.path.write_text(file.path.read_text() + '{"step": 7, "val/loss": 9')  # a line that a kill cut off
    assert last_value(file.path, "val/loss") == 0.25
    assert last_value(file.path, "train/loss") == 2.5
    with pytest.raises(UserError, match=r"val/los:.*did you mean val/loss"):
        last_value(file.path, "val/los")


def test_a_diverged_run_has_an_objective_that_is_no_number(file: MetricsFile) -> None:
    file.log_metrics({"val/loss": math.inf}, 6)
    assert math.isnan(last_value(file.path, "val/loss"))


def test_another_logger_on_the_file_appends(file: MetricsFile) -> None:
    MetricsFile(file.path).log_metrics({"train/loss": 9.0}, 6)
    assert [line["step"] for line in lines(file.path)] == [1, 2, 3, 4, 5, 6, 7]


def test_rewinding_drops_what_comes_after_the_step_and_what_is_cut_off(file: MetricsFile) -> None:
    with file.path.open("a") as opened:
        opened.write('{"step": 2, "train/lo')
    file.rewind(4)
    assert [line["step"] for line in lines(file.path)] == [1, 2, 3, 4]
    file.log_metrics({"train/loss": 7.0}, 4)
    assert [line["step"] for line in lines(file.path)] == [1, 2, 3, 4, 5]


def test_the_callback_rewinds_to_the_trainers_step_on_rank_0_alone(file: MetricsFile) -> None:
    callback = Rewind(file)
    callback.on_train_start(SimpleNamespace(is_global_zero=False, global_step=2), None)  # type: ignore[arg-type]
    assert len(lines(file.path)) == 6
    callback.on_train_start(SimpleNamespace(is_global_zero=True, global_step=2), None)  # type: ignore[arg-type]
    assert len(lines(file.path)) == 2


def test_rewinding_nothing_is_nothing(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").rewind(3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_resumed_stage_has_each_step_once(tiny_shapes: Path, tmp_path: Path) -> None:
    more = [
        "stages=[first_stage]",
        "curriculum.first_stage.trainer.max_steps=4",
        "curriculum.first_stage.trainer.val_check_interval=2",
    ]
    stage = train(tiny_shapes, tmp_path, *more) / "first_stage"
    whole = lines(stage / "metrics.jsonl")
    assert [line["step"] for line in whole if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in whole if "val/psnr" in line] == [2, 4]

    shutil.rmtree(stage / "model")
    (newest,) = (stage / "checkpoints").glob("step?00000004")
    shutil.rmtree(newest)
    train(tiny_shapes, tmp_path, *more)
    resumed = lines(stage / "metrics.jsonl")
    assert [(line["step"], line.get("train/loss"), line.get("val/psnr")) for line in resumed] == [
        (line["step"], line.get("train/loss"), line.get("val/psnr")) for line in whole
    ]
