"""Launches with several processes: one folder, clean command lines, the right strategy."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from ldm.config.build import _strategy
from ldm.config.processes import LAUNCHER, agreed, job_processes
from ldm.training.first_stage import FirstStageModule

ASK = """
import sys
from ldm.config.processes import agreed
print(*[agreed(name, sys.argv[1]) for name in ("run", "sweep", "run")])
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*LAUNCHER, "RANK", "SLURM_PROCID", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"]:
        monkeypatch.delenv(name, raising=False)


def test_a_single_process_agrees_with_itself(alone: None) -> None:
    assert [agreed("run", "a"), agreed("run", "b")] == ["a", "b"]


def ask(value: str, environment: dict[str, str]) -> "subprocess.Popen[str]":
    merged = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | environment
    return subprocess.Popen([sys.executable, "-c", ASK, value], stdout=subprocess.PIPE, text=True, env=merged)


@pytest.mark.slow
def test_the_tasks_of_slurm_take_rank_0s_folder(tmp_path: Path) -> None:
    common = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": f"77{os.getpid() % 10000:04d}",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    ranks = [ask(f"of_{rank}", common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}) for rank in (1, 0)]
    try:
        assert [rank.communicate(timeout=280)[0].split() for rank in ranks] == [["of_0"] * 3] * 2
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_a_jobs_processes_get_its_folder_and_in_a_sweep_its_overrides(
    alone: None, monkeypatch: pytest.MonkeyPatch, mode: RunMode
) -> None:
    hydra = OmegaConf.create(
        {
            "mode": mode,
            "run": {"dir": "outputs/now"},
            "runtime": {"output_dir": "/out/lr=1"},
            "overrides": {"task": ["lr=1"]},
        }
    )
    OmegaConf.set_readonly(hydra, True)
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: hydra))
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "lr=1,2"])
    monkeypatch.setenv("MASTER_PORT", "5")
    with pytest.raises(ZeroDivisionError), job_processes():
        assert hydra.run.dir == "/out/lr=1"
        assert sys.argv == (["train.py", "lr=1"] if mode is RunMode.MULTIRUN else ["train.py", "-m", "lr=1,2"])
        os.environ.update({name: "7" for name in LAUNCHER})  # as Lightning's launcher does
        raise ZeroDivisionError
    assert sys.argv == ["train.py", "-m", "lr=1,2"]
    assert {name: os.environ.get(name) for name in LAUNCHER} == dict.fromkeys(LAUNCHER) | {"MASTER_PORT": "5"}


@pytest.mark.parametrize(
    ("strategy", "devices", "discriminator", "expected"),
    [
        ("ddp", 2, True, "ddp_find_unused_parameters_true"),
        ("auto", 2, True, "ddp_find_unused_parameters_true"),
        ("auto", "auto", True, "ddp_find_unused_parameters_true"),
        ("auto", -1, True, "ddp_find_unused_parameters_true"),
        ("auto", 1, True, "auto"),
        ("ddp_spawn", 2, True, "ddp_spawn"),
        ("ddp", 2, False, "ddp"),
    ],
)
def test_ddp_looks_for_unused_parameters_where_there_is_a_discriminator(
    strategy: str, devices: Any, discriminator: bool, expected: str
) -> None:
    module: Any = FirstStageModule.__new__(FirstStageModule)
    module.__dict__["loss"] = SimpleNamespace(discriminator=object() if discriminator else None)
    trainer = OmegaConf.create({"strategy": strategy, "devices": devices, "num_nodes": 1})
    assert _strategy(trainer, module) == expected
