"""How much of the library a command runs, see benchmarks/hops.py; and how soon a misspelled knob is answered."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FUNCTIONS = 216
LIBRARIES = {"torch", "pytorch_lightning", "lightning_fabric", "transformers", "webdataset", "torchmetrics", "scipy"}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HYDRA_FULL_ERROR": "0"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.fixture(scope="module")
def facts(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What sample.py ran for one picture of a class."""
    folder = tmp_path_factory.mktemp("hops")
    command = ["sample.py", f"checkpoint={tiny_model('class')}", "prompt=2", "n=1", f"out={folder / 'out'}"]
    done = run("benchmarks/hops.py", "--trace", str(folder / "facts.json"), *command)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "out").glob("*_seed0.png"))) == 1
    result: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return result


def test_a_picture_needs_a_part_of_the_library(facts: dict[str, Any]) -> None:
    assert "ldm.sampling.ddim" in facts["modules"]
    assert len(facts["modules"]) <= 66
    assert not [name for name in facts["modules"] if name.startswith(("ldm.training", "ldm.data.loading"))]


def test_a_picture_takes_few_functions(facts: dict[str, Any]) -> None:
    assert "UNet.forward" in facts["functions"]["networks/unet.py"]
    assert sum(map(len, facts["functions"].values())) <= FUNCTIONS


def test_a_command_composes_once(facts: dict[str, Any]) -> None:
    assert facts["compositions"] == 1


def test_a_picture_of_a_class_needs_no_training_library_and_no_text_library(facts: dict[str, Any]) -> None:
    assert facts["packages"] == []


@pytest.mark.parametrize(("script", "misspelled", "nearest"), [("train.py", "sedd=3", "seed"),
                                                                ("sample.py", "stepz=3", "steps")])  # fmt: skip
def test_a_misspelled_knob_is_answered_before_torch_is_loaded(script: str, misspelled: str, nearest: str) -> None:
    arguments = [script, *(["experiment=quickstart"] if script == "train.py" else []), misspelled]
    code = (
        f"import runpy, sys\nsys.argv = {arguments!r}\ntry:\n    runpy.run_path({script!r}, run_name='__main__')\n"
        "finally:\n    print(*(name for name in sys.modules if '.' not in name))"
    )
    done = run("-c", code)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {misspelled.partition('=')[0]}: ") and nearest in done.stderr
    assert "hydra" in done.stdout.split() and not LIBRARIES & set(done.stdout.split())


def test_a_sweep_starts_on_the_command_line_alone(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/sweep.yaml").write_text("# @package _global_\nname: sweep\nhydra: {mode: MULTIRUN}\n")
    command = ["train.py", "--config-dir", str(tmp_path), "experiment=sweep"]
    done = run(*command)
    assert done.returncode == 1 and done.stderr.startswith("error: hydra.mode=MULTIRUN: ")
    for folder, sweep in (
        (tmp_path / "a", "-m"),
        (tmp_path / "b", "hydra.mode=MULTIRUN"),
    ):  # each job starts, and is refused for its own knob
        done = run(*command, "seed=1,2", "stages=[nosuch]", f"hydra.sweep.dir={folder}", sweep)
        assert done.returncode == 1 and "nosuch" in done.stderr
        assert [path.name for path in folder.iterdir() if path.is_dir()]
