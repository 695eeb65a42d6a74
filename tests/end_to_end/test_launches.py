"""Launches with several processes, as a user types them: each run is one folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ldm.training.metrics_file import last_value

ROOT = Path(__file__).parents[2]
DDP = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"]


def run(folder: Path, *command: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr


def tiny(shapes: Path, experiment: str = "quickstart") -> list[str]:
    shards = [f"data.train.shards={shapes}/train", f"data.val.shards={shapes}/val"]
    return [f"experiment={experiment}", "variant=tiny", "stages=[first_stage]", *shards]


def finished(folder: Path) -> list[str]:
    return sorted(str(path.parents[2].relative_to(folder)) for path in folder.rglob("model.json"))


@pytest.mark.slow
def test_the_jobs_of_a_sweep_have_a_folder_each(tiny_shapes: Path, tmp_path: Path) -> None:
    run(tmp_path, str(ROOT / "train.py"), "-m", *tiny(tiny_shapes), *DDP, "optimizer.lr=1e-4,2e-4")
    (sweep,) = (tmp_path / "outputs" / "quickstart").iterdir()
    assert finished(sweep) == ["optimizer.lr=0.0001", "optimizer.lr=0.0002"]
    assert len(list(tmp_path.rglob("metrics.jsonl"))) == 2
    table = (sweep / "sweep.md").read_text()  # of both jobs, by the folders' names
    assert all(f"| optimizer.lr={lr} " in table for lr in ("0.0001", "0.0002")) and "val/psnr" in table


@pytest.mark.slow
def test_optuna_is_given_the_objective(tiny_shapes: Path, tmp_path: Path) -> None:
    run(tmp_path, str(ROOT / "train.py"), "-m", *tiny(tiny_shapes), "objective=val/psnr", "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize", "hydra.sweep.subdir=${hydra:job.num}",
        "optimizer.lr=tag(log,interval(1e-5,1e-3))")  # fmt: skip
    (sweep,) = (tmp_path / "outputs" / "quickstart").iterdir()
    logs = [sweep / job / "first_stage" / "metrics.jsonl" for job in ("0", "1")]
    best = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert 1e-5 <= best["best_params"]["optimizer.lr"] <= 1e-3
    assert best["best_value"] == max(last_value(log, "val/psnr") for log in logs)


@pytest.mark.slow
def test_torchruns_processes_agree_on_a_folder(tiny_shapes: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run(tmp_path, *torchrun, str(ROOT / "train.py"), *tiny(tiny_shapes), *DDP)
    (folder,) = (tmp_path / "outputs" / "quickstart").iterdir()
    assert finished(folder) == ["."]


@pytest.mark.slow
def test_a_first_stage_with_a_discriminator_trains_under_ddp(tiny_shapes: Path, tmp_path: Path) -> None:
    run(tmp_path, str(ROOT / "train.py"), *tiny(tiny_shapes, "emoji"), *DDP, "hydra.run.dir=run",
        "curriculum.first_stage.trainer.max_steps=3")  # fmt: skip
    assert finished(tmp_path) == ["run"]
    assert "discriminator_loss" in (tmp_path / "run" / "first_stage" / "metrics.jsonl").read_text()
