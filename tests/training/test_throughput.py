"""Throughput: with a clock that the test turns, what is logged is what was spent."""

from types import SimpleNamespace
from typing import Any

import pytest

from ldm.data.loading.loader import StepLoader
from ldm.training import throughput
from ldm.training.throughput import Throughput

BATCH = SimpleNamespace(images=[None] * 4)


class Rig:
    """A trainer with two ranks, a loader and a clock, all turned by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every_n_steps: int) -> None:
        self.now = 100.0
        self.logged: list[dict[str, float]] = []
        monkeypatch.setattr(throughput, "_now", lambda: self.now)
        loader = StepLoader.__new__(StepLoader)
        loader.__dict__["waited_s"] = 3.0
        self.trainer: Any = SimpleNamespace(global_step=10, world_size=2, train_dataloader=loader)
        self.module: Any = SimpleNamespace(log_dict=self.logged.append)
        self.callback = Throughput(every_n_steps)
        self.callback.on_train_start(self.trainer, self.module)

    def micro_step(self, wait: float, work: float, steps: int = 1) -> None:
        self.now += wait + work
        self.trainer.train_dataloader.__dict__["waited_s"] += wait
        self.trainer.global_step += steps
        self.callback.on_train_batch_end(self.trainer, self.module, None, BATCH, 0)


def test_it_logs_what_the_steps_since_the_last_time_took(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, every_n_steps=2)
    rig.micro_step(50.0, 50.0)  # 11: warms up
    rig.micro_step(0.5, 1.5)  # 12
    rig.micro_step(0.0, 1.0)  # 13
    rig.micro_step(1.0, 2.0)  # 14
    assert [set(entry) for entry in rig.logged] == [
        {"throughput/images_per_s", "throughput/seconds_per_step", "throughput/data_wait_share"}
    ] * 2
    assert list(rig.logged[0].values()) == pytest.approx([8 / 2.0, 2.0, 0.25])
    assert list(rig.logged[1].values()) == pytest.approx([16 / 4.0, 2.0, 0.25])


def test_validation_and_pauses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, every_n_steps=2)
    rig.micro_step(0.0, 1.0)
    rig.callback.on_validation_start(rig.trainer, rig.module)
    rig.now += 1000.0
    rig.callback.on_validation_end(rig.trainer, rig.module)
    with rig.callback.paused():
        rig.now += 500.0
    rig.micro_step(0.0, 4.0)
    assert rig.logged[0]["throughput/seconds_per_step"] == pytest.approx(4.0)


def test_accumulated_micro_steps_are_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, every_n_steps=2)
    rig.micro_step(0.0, 1.0, steps=0)
    rig.micro_step(0.0, 1.0)
    rig.micro_step(0.0, 1.0, steps=0)
    rig.micro_step(0.0, 1.0)
    assert len(rig.logged) == 1
    assert rig.logged[0]["throughput/seconds_per_step"] == pytest.approx(2.0)
    assert rig.logged[0]["throughput/images_per_s"] == pytest.approx(16 / 2.0)
