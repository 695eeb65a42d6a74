"""What a launch makes of trainer, callbacks and loggers: all of it takes effect, or is refused by name."""

import inspect
from pathlib import Path
from typing import Any, cast

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.precision import DoublePrecision

from ldm.config.build import REFUSED
from ldm.errors import UserError
from ldm.training.checkpoint_io import FolderCheckpointIO
from ldm.training.curriculum import Job
from ldm.training.ema import EMA
from tests.training.miniature import launch


def job(shapes: Path, run: Path, *more: str) -> Job:
    """The first stage, built."""
    (stage,), finished = launch(shapes, run, "stages=[first_stage]", *more)
    return stage.build(finished)


class Fails(pl.Callback):
    """A callback whose constructor fails."""

    def __init__(self, path: str = "") -> None:
        raise FileNotFoundError(f"no such list: {path}")


class Note(pl.Callback):
    """A callback with state."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}


class Named(Note):
    @property
    def state_key(self) -> str:
        return f"note {self.name}"


# --------------------------------------------------------------------------------------------------------- trainer


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_of_the_trainer_with_another_place_names_it(name: str, tiny_shapes: Path, tmp_path: Path) -> None:
    assert name in inspect.signature(pl.Trainer).parameters
    with pytest.raises(UserError, match=f"^trainer\\.{name}: ") as caught:
        launch(tiny_shapes, tmp_path, "stages=[first_stage]", f"trainer.{name}=1")
    assert REFUSED[name] in str(caught.value)


def test_every_argument_of_the_trainer_is_refused_or_reaches_it() -> None:
    """Those that the launch gives by itself are refused; `plugins` are added to its own."""
    given = {"callbacks", "logger", "default_root_dir", "max_epochs", "check_val_every_n_epoch", "enable_checkpointing",
             "enable_progress_bar"}  # fmt: skip
    assert given <= REFUSED.keys()


def test_the_trainers_plugins_take_effect(tiny_shapes: Path, tmp_path: Path) -> None:
    plugin = "trainer.plugins=[{_target_: pytorch_lightning.plugins.precision.DoublePrecision}]"
    trainer = job(tiny_shapes, tmp_path, plugin, "trainer.precision=null").trainer
    assert isinstance(trainer.precision_plugin, DoublePrecision)
    assert isinstance(trainer.strategy.checkpoint_io, FolderCheckpointIO)


def test_what_lightning_refuses_is_a_users_error(tiny_shapes: Path, tmp_path: Path) -> None:
    plugin = "trainer.plugins=[{_target_: pytorch_lightning.plugins.precision.DoublePrecision}]"
    with pytest.raises(UserError, match=r"^trainer: .*precision"):
        job(tiny_shapes, tmp_path, plugin)


def test_the_trainers_knobs_reach_it(tiny_shapes: Path, tmp_path: Path) -> None:
    knobs = ["trainer.log_every_n_steps=7", "trainer.limit_val_batches=0.5", "trainer.max_time=00:08:00:00"]
    trainer = job(tiny_shapes, tmp_path, *knobs, "curriculum.first_stage.trainer.max_steps=9").trainer
    assert (trainer.log_every_n_steps, trainer.limit_val_batches, trainer.max_steps) == (7, 0.5, 9)
    assert trainer.default_root_dir == str(tmp_path / "first_stage")
    (timer,) = [c for c in callbacks(trainer) if isinstance(c, pl.callbacks.Timer)]
    assert timer._duration == 8 * 3600


# ------------------------------------------------------------------------------------------- callbacks and loggers


def callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return cast(list[pl.Callback], trainer.callbacks)  # type: ignore[attr-defined]


def test_a_users_callback_and_logger_are_built(tiny_shapes: Path, tmp_path: Path) -> None:
    mine = f"callbacks.mine={{_target_: {__name__}.Named, name: x}}"
    other = f"callbacks.other={{_target_: {__name__}.Named, name: y}}"
    trainer = job(tiny_shapes, tmp_path, mine, other, "logger=csv", "logger.csv.name=numbers").trainer
    assert [c.name for c in callbacks(trainer) if isinstance(c, Note)] == ["x", "y"]
    (csv,) = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    assert (csv.name, Path(csv.save_dir)) == ("numbers", tmp_path / "first_stage")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"callbacks.mine={{_target_: {__name__}.Fails, path: a.txt}}",
         rf"callbacks\.mine: {__name__}\.Fails cannot be built: FileNotFoundError: no such list: a\.txt"),
        (f"callbacks.mine={{_target_: {__name__}.Note}}\ncallbacks.other={{_target_: {__name__}.Note}}",
         "callbacks: two of them keep their state under 'Note'"),
        ("callbacks.second={_target_: ldm.training.ema.EMA, decay: 0.5}",
         "callbacks: two of them keep their state under 'EMA'"),
        ("callbacks.mine={_target_: torch.nn.Identity}", r"callbacks\.mine: torch\.nn\.Identity is not a .*Callback"),
        ("logger.mine={_target_: torch.nn.Identity}", r"logger\.mine: torch\.nn\.Identity is not a .*Logger"),
        ("callbacks.ema.decay=2", r"callbacks\.ema\.decay=2"),
        ("callbacks.checkpoints.keep=0", "callbacks.checkpoints: .*keep=0"),
        ("callbacks.images.n=0", "callbacks.images: .*n=0"),
    ],
)  # fmt: skip
def test_a_callback_that_cannot_be_used_is_named(
    override: str, message: str, tiny_shapes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        job(tiny_shapes, tmp_path, *override.splitlines())


def test_callbacks_at_null_are_left_out(tiny_shapes: Path, tmp_path: Path) -> None:
    null = [f"callbacks.{name}=null" for name in ("ema", "images", "checkpoints", "throughput")]
    made = job(tiny_shapes, tmp_path, *null)
    assert not any(isinstance(c, EMA) for c in callbacks(made.trainer))
    assert made.checkpoints is None
    names = {type(c).__name__ for c in callbacks(made.trainer)}
    assert not names & {"EMA", "ImageLogger", "Checkpoints", "ModelCheckpoint", "Throughput", "Progress"}


# ---------------------------------------------------------------------------------------------------------- launch


@pytest.mark.parametrize("compiled", [True, False])
def test_compile_compiles_what_is_trained(compiled: bool, tiny_shapes: Path, tmp_path: Path) -> None:
    module = job(tiny_shapes, tmp_path, f"compile={str(compiled).lower()}").module
    assert [network._compiled_call_impl is not None for network in module.compiled_networks()] == [compiled] * 2


def test_the_stages_that_are_named_run_in_that_order(tiny_shapes: Path, tmp_path: Path) -> None:
    planned, finished = launch(tiny_shapes, tmp_path, "stages=[base,first_stage]")
    assert [(stage.name, stage.folder) for stage in planned] == [
        (name, tmp_path / name) for name in ("base", "first_stage")
    ]
    assert finished == {}


def test_name_and_seed_are_the_runs(tiny_shapes: Path, tmp_path: Path) -> None:
    weights = []
    for seed in (1, 1, 2):
        made = job(tiny_shapes, tmp_path, "name=mine", f"seed={seed}")
        assert (made.record["experiment"], made.module.seed, made.datamodule.seed) == ("mine", seed, seed)
        weights.append(next(made.module.parameters()).detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
