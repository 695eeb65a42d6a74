"""A run that is killed again and again goes on, as with resume=auto, to the uninterrupted run's weights exactly."""

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from ldm import checkpoint
from ldm.training import curriculum
from tests.training.miniature import launch

Kill = Callable[[list[pl.Callback]], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class AtBatch(pl.Callback):
    """Dies when a micro-step begins, which may be in the middle of an accumulation."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            die()


def at_batch(batch: int) -> Kill:
    return lambda callbacks: callbacks.append(AtBatch(batch))


def in_tensors(step: int) -> Kill:
    """Dies when the second file of a checkpoint is half written."""

    def arrange(callbacks: list[pl.Callback]) -> None:
        save = checkpoint.save_tensors

        def half(path: Path, tensors: Any) -> None:
            save(path, tensors)
            if f"step_{step:08d}" in str(path) and len(list(path.parent.iterdir())) == 2:
                os.truncate(path, path.stat().st_size // 2)
                die()

        checkpoint.save_tensors = half  # type: ignore[assignment]

    return arrange


def before_rename(step: int) -> Kill:
    """Dies when a checkpoint is complete, but has not got its name yet."""

    def arrange(callbacks: list[pl.Callback]) -> None:
        replace = os.replace

        def last(source: Path, target: Path) -> None:
            if Path(target).name == f"step_{step:08d}":
                die()
            replace(source, target)

        os.replace = last  # type: ignore[assignment]

    return arrange


def while_deleting(step: int) -> Kill:
    """Dies when half of an old checkpoint is deleted."""

    def arrange(callbacks: list[pl.Callback]) -> None:
        def half(path: Path) -> None:
            if f"step_{step:08d}" in path.name:
                (path / "checkpoint.json").unlink()
                die()

        checkpoint.remove = half

    return arrange


class Started(pl.Callback):
    """Notes in a file at which step each attempt begins."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        with open(self.file, "a") as file:
            file.write(f"{trainer.global_step} ")


def attempt(shapes: Path, run: Path, overrides: list[str], kill: Kill) -> int:
    """Runs the stage in a process of its own; returns the exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            (stage,), models = launch(shapes, run, *overrides)
            build = stage.build

            def built(models: dict[str, Path]) -> curriculum.Job:
                job = build(models)
                kill(job.trainer.callbacks)  # type: ignore[attr-defined]
                job.trainer.callbacks.append(Started(run / "started"))  # type: ignore[attr-defined]
                return job

            stage.build = built
            curriculum.run([stage], models)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def first_stage(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    return curriculum.run(*launch(tiny_shapes, run, "stages=[first_stage]"))["first_stage"]


BASE = ["trainer.accumulate_grad_batches=2", "network.dropout=0.1"]
GAN = [
    "first_stage_loss.discriminator._target_=ldm.networks.discriminator.PatchDiscriminator",
    "first_stage_loss.discriminator.channels=8",
    "first_stage_loss.discriminator.layers=1",
]
# checkpoints at 2, 4, 6 and the last step, 7; the newest two are kept
SCENES = {
    "base": (BASE, [at_batch(3), in_tensors(4), before_rename(6), while_deleting(2)], "0 0 2 4 6 "),
    "first_stage": (GAN, [at_batch(3), at_batch(5)], "0 2 4 "),
}


@pytest.mark.parametrize("stage", SCENES)
def test_a_killed_run_goes_on_to_the_same_weights(
    stage: str, first_stage: Path, tiny_shapes: Path, tmp_path: Path
) -> None:
    more, kills, started = SCENES[stage]
    more = [
        *more,
        f"stages=[{stage}]",
        f"curriculum.{stage}.trainer.max_steps=7",
        "callbacks.checkpoints.every_n_steps=2",
    ]
    more += [f"first_stage_from={first_stage}"] if stage == "base" else []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    for kill in kills:
        assert attempt(tiny_shapes, killed, more, kill) == -signal.SIGKILL
    assert attempt(tiny_shapes, killed, more, lambda callbacks: None) == 0
    assert attempt(tiny_shapes, whole, more, lambda callbacks: None) == 0

    assert (killed / "started").read_text() == started
    for name in (
        "model/weights",
        "model/ema",
        *(f"checkpoints/step_00000007/{n}" for n in ("model", "optimizer", "ema")),
    ):
        file = f"{stage}/{name}.safetensors"
        assert checkpoint.sha256(killed / file) == checkpoint.sha256(whole / file), name
    left = [path.name for path in (killed / stage / "checkpoints").iterdir()]
    assert sorted(left) == ["step_00000006", "step_00000007"]
