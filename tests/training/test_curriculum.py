"""A launch is a curriculum: stages hand on, finished ones are not run again, interrupted ones go on exactly."""

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer

from ldm.checkpoint import load_tensors, sha256
from ldm.config.trained import load_trained
from ldm.errors import UserError
from ldm.generation import Generator, Request, SamplingSettings
from ldm.interop.model_folder import open_model_folder
from ldm.sampling.ddim import DDIM
from ldm.sampling.grid import Trailing
from ldm.sampling.guidance import ClassifierFree
from ldm.training import curriculum
from ldm.training.curriculum import Interrupted
from tests.training.miniature import launch


@pytest.fixture(scope="module")
def finished(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the three stages, in miniature."""
    run = tmp_path_factory.mktemp("run")
    curriculum.run(*launch(tiny_shapes, run))
    return run


def test_every_stage_leaves_a_model_and_hands_it_on(finished: Path) -> None:
    records = {
        name: open_model_folder(finished / name / "model").record for name in ("first_stage", "base", "finetune")
    }
    assert [records[name]["kind"] for name in records] == ["first_stage", "diffusion", "diffusion"]
    assert all(record["step"] == 2 for record in records.values())
    first, _ = load_tensors(finished / "first_stage" / "model" / "ema.safetensors")
    for stage in ("base", "finetune"):
        held, _ = load_tensors(finished / stage / "model" / "weights.safetensors")
        assert all(torch.equal(held[f"first_stage.{name}"], tensor) for name, tensor in first.items())
        assert held["first_stage.latent_std"].tolist() == pytest.approx(records["first_stage"]["latent_std"])


def test_normalised_latents_have_unit_statistics(finished: Path) -> None:
    record = open_model_folder(finished / "first_stage" / "model").record
    assert len(record["latent_mean"]) == 4
    assert all(std > 0 for std in record["latent_std"])
    assert record["psnr_db"] > 0


def test_finished_stages_are_not_run_again(finished: Path, tiny_shapes: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    models = curriculum.run(*launch(tiny_shapes, finished))
    assert list(models) == ["first_stage", "base", "finetune"]


def test_a_trained_model_samples_each_image_from_its_own_seed(finished: Path) -> None:
    trained = load_trained(str(finished), "ema", "cpu")
    assert trained.folder.record["stage"] == "finetune"
    settings = SamplingSettings(DDIM(), Trailing(), ClassifierFree(), 3, 3.0)
    requests = [Request({"caption": "a large red circle in the centre"}, seed) for seed in range(5)]
    generator = Generator(trained.model)
    together = torch.stack(list(generator.generate(requests, (32, 32), settings, batch_size=5)))
    apart = torch.stack(list(generator.generate(requests[3:], (32, 32), settings, batch_size=1)))
    torch.testing.assert_close(together[3:], apart, rtol=0, atol=1e-5)
    assert not torch.equal(together[0], together[1])


def test_a_first_stage_is_no_model_to_sample_from(finished: Path) -> None:
    with pytest.raises(UserError, match="kind 'first_stage'"):
        load_trained(str(finished / "first_stage"), "ema", "cpu")


def test_a_stage_whose_predecessor_is_missing_says_so(tiny_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="first_stage_from=first_stage: that stage is not finished"):
        curriculum.run(*launch(tiny_shapes, tmp_path, "stages=[base]"))


class StopAfter(pl.Callback):
    """Sends this process a SIGTERM in the middle of a run, as a scheduler would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("stage", ["first_stage", "base"])
def test_an_interrupted_stage_goes_on_to_the_same_weights(
    finished: Path, tiny_shapes: Path, tmp_path: Path, stage: str
) -> None:
    more = [f"stages=[{stage}]", f"curriculum.{stage}.trainer.max_steps=5", "network.dropout=0.1"]
    more += [] if stage == "first_stage" else [f"first_stage_from={finished}/first_stage"]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    curriculum.run(*launch(tiny_shapes, whole, *more))

    (stopped,), models = launch(tiny_shapes, parts, *more)
    job = stopped.build(models)
    job.trainer.callbacks.insert(0, StopAfter(2))  # type: ignore[attr-defined]
    with pytest.raises(Interrupted) as stop:
        curriculum._train(stopped, job)
    assert stop.value.exit_status == 128 + signal.SIGTERM
    curriculum.run(*launch(tiny_shapes, parts, *more))

    for file in ("weights.safetensors", "ema.safetensors"):
        expected, _ = load_tensors(whole / stage / "model" / file)
        resumed, _ = load_tensors(parts / stage / "model" / file)
        assert all(torch.equal(resumed[name], expected[name]) for name in expected)


class Stop(pl.Callback):
    """Stops the trainer after so many batches, or at the validation after so many steps, as other callbacks do."""

    def __init__(self, batches: int = -1, validation: int = -1) -> None:
        self.batches = batches
        self.validation = validation

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.should_stop or batch_idx + 1 == self.batches

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.validation

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.validation


@pytest.mark.parametrize(
    ("accumulation", "stop", "step"),
    [(1, Stop(validation=3), 3), (2, Stop(batches=3), 1)],
    ids=["at a validation", "in the middle of a step"],
)
def test_an_early_stop_is_saved_and_goes_on_to_the_same_weights(
    finished: Path, tiny_shapes: Path, tmp_path: Path, accumulation: int, stop: Stop, step: int
) -> None:
    more = ["stages=[base]", f"first_stage_from={finished}/first_stage", "network.dropout=0.1"]
    more += [f"curriculum.base.trainer.accumulate_grad_batches={accumulation}", "curriculum.base.trainer.max_steps=4"]
    more += ["callbacks.checkpoints.every_n_steps=100", "trainer.val_check_interval=3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    curriculum.run(*launch(tiny_shapes, whole, *more))

    inodes = set()
    for _ in range(2):  # the second time nothing is done, and nothing new is there to save
        (stopped,), models = launch(tiny_shapes, parts, *more)
        job = stopped.build(models)
        job.trainer.callbacks.append(stop)  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=f"ended at step {step} of 4.*its state is saved"):
            curriculum._train(stopped, job)
        (saved,) = (parts / "base" / "checkpoints").iterdir()
        assert saved.name == f"step_{step:08d}"
        inodes.add(saved.stat().st_ino)
    assert len(inodes) == 1
    curriculum.run(*launch(tiny_shapes, parts, *more))

    for file in ("weights.safetensors", "ema.safetensors"):
        assert sha256(parts / "base" / "model" / file) == sha256(whole / "base" / "model" / file)


def test_a_time_limit_saves_and_holds_for_the_stage(tiny_shapes: Path, tmp_path: Path) -> None:
    """trainer.max_time is Lightning's Timer, which counts the seconds of all attempts."""
    for limit, stopped in (("milliseconds", True), ("milliseconds", True), ("hours", False)):
        (stage,), models = launch(
            tiny_shapes, tmp_path, "stages=[first_stage]", "callbacks.checkpoints.every_n_steps=100"
        )
        job = stage.build(models)
        job.trainer.callbacks.append(Timer({limit: 1}))  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="ended at step 1 of 2: a time") if stopped else nullcontext():
            curriculum._train(stage, job)
        steps = [path.name for path in (tmp_path / "first_stage" / "checkpoints").iterdir()]
        assert sorted(steps) == (["step_00000001"] if stopped else ["step_00000001", "step_00000002"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("base/checkpoints/step_00000001", None),
        ("base/checkpoints/step_00000001/model.safetensors", "neither a run's folder"),
        ("base/model", "neither a run's folder"),
        ("first_stage/checkpoints/step_00000001", "not a checkpoint of a stage that this launch runs"),
        ("nowhere", "nothing is there"),
    ],
)
def test_resume_takes_a_run_or_a_checkpoint(finished: Path, tiny_shapes: Path, given: str, message: str | None) -> None:
    more = ["stages=[base]", f"resume={finished / given}"]
    if message is None:
        assert launch(tiny_shapes, finished, *more)[0][0].resume_from == (finished / given).resolve()
    else:
        with pytest.raises(UserError, match=message):
            launch(tiny_shapes, finished, *more)


def test_two_optimizers_count_one_step(tiny_shapes: Path, tmp_path: Path) -> None:
    """pytorch-lightning#17958: the discriminator's steps must not count."""
    more = [
        "stages=[first_stage]",
        "curriculum.first_stage.trainer.max_steps=4",
        "first_stage_loss.discriminator._target_=ldm.networks.discriminator.PatchDiscriminator",
        "first_stage_loss.discriminator.channels=8",
        "first_stage_loss.discriminator.layers=1",
    ]
    (stage,), models = launch(tiny_shapes, tmp_path, *more)
    job = stage.build(models)
    seen: list[int] = []
    discriminator = job.module.loss.discriminator  # type: ignore[attr-defined]
    before = {name: p.detach().clone() for name, p in discriminator.named_parameters()}
    forward = job.module.loss.generator  # type: ignore[attr-defined]
    job.module.loss.generator = lambda i, r, step, last: (seen.append(step), forward(i, r, step, last))[1]  # type: ignore
    curriculum._train(stage, job)
    assert seen == [0, 1, 2, 3]
    assert any(not torch.equal(p, before[name]) for name, p in discriminator.named_parameters())
