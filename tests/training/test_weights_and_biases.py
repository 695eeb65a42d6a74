"""wandb as a guest: its absence or failure is told once and stops nothing; offline it writes."""

import logging
from pathlib import Path
from typing import Any

import pytest

from ldm.training import weights_and_biases
from ldm.training.loggers import log_image
from ldm.training.weights_and_biases import WeightsAndBiases
from tests.training.miniature import train


class Fake:
    """A WandbLogger that notes what it is asked."""

    made: list["Fake"]

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.asked: list[tuple[Any, ...]] = []
        self.experiment = self
        type(self).made.append(self)

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.asked.append(("params", params))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.asked.append(("metrics", metrics, step))

    def log_image(self, key: str, images: list[str], step: int) -> None:
        self.asked.append(("image", key, images, step))

    def finish(self, status: int) -> None:
        self.asked.append(("finish", status))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    Fake.made = []
    monkeypatch.setattr(weights_and_biases, "WandbLogger", Fake)
    return Fake


def test_it_starts_with_the_first_logging_and_a_resumed_stage_has_the_same_run(
    fake: type[Fake], tmp_path: Path
) -> None:
    for started in range(2):
        logger = WeightsAndBiases(tmp_path, project="p", name="n", entity="lab")
        logger.log_hyperparams({"seed": 1})
        assert len(fake.made) == started
        logger.log_metrics({"train/loss": 1.0}, 49)
        log_image(logger, "samples", tmp_path / "samples" / "step_00000050.png", 50)
        logger.finalize("success")
    first, second = fake.made
    assert first.asked == [
        ("params", {"seed": 1}),
        ("metrics", {"train/loss": 1.0}, 50),
        ("image", "samples", [str(tmp_path / "samples" / "step_00000050.png")], 50),
        ("finish", 0),
    ]
    assert first.options == second.options
    assert first.options["entity"] == "lab" and first.options["save_dir"] == str(tmp_path)


@pytest.mark.parametrize("when", ["__init__", "log_metrics", "log_image", "finish"])
def test_a_failure_is_told_once_and_it_is_not_asked_again(
    fake: type[Fake], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, when: str
) -> None:
    calls: list[Any] = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        raise ConnectionError("no network\nand a long trace")

    monkeypatch.setattr(fake, when, fail)
    logger = WeightsAndBiases(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            logger.log_metrics({"x": 1.0}, step)
            log_image(logger, "samples", tmp_path / "s.png", step)
        logger.finalize("success")
    assert len(calls) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed (ConnectionError: no network); training goes on without it"
    ]


def test_training_goes_on_where_wandb_fails(
    fake: type[Fake], monkeypatch: pytest.MonkeyPatch, tiny_shapes: Path, tmp_path: Path
) -> None:
    def missing(*args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("wandb is not installed")

    monkeypatch.setattr(fake, "__init__", missing)
    run = train(tiny_shapes, tmp_path, "stages=[first_stage]", "logger=wandb")
    assert (run / "first_stage" / "model" / "model.json").exists()
    assert (run / "first_stage" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_offline_it_writes_a_run_for_each_stage(
    tiny_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train(tiny_shapes, tmp_path, "stages=[first_stage,base]", "logger=wandb")
    for stage in ("first_stage", "base"):
        (offline,) = (run / stage / "wandb").glob("offline-run-*")
        assert (run / stage / "wandb_run_id").read_text().strip() in offline.name
        assert next(iter(offline.glob("*.wandb"))).stat().st_size > 0
        assert list(offline.glob("files/media/images/images_*.png"))
    assert "wandb failed" not in caplog.text
