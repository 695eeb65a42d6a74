"""Throughput: with a clock that the test turns, what is logged is what was spent."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from ldm.data.loading.loader import StepLoader
from ldm.training import module, throughput
from ldm.training.module import TrainingModule
from ldm.training.throughput import Throughput

BATCH = SimpleNamespace(images=[None] * 4)


class Task(TrainingModule):
    """A task that trains nothing, and keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[str, float]] = []

    def compiled_networks(self) -> list[nn.Module]:
        return []

    def log(self, name: str, value: float) -> None:  # type: ignore[override]
        self.logged.append((name, value))


class Rig:
    """A trainer with two ranks, a loader and a clock, all turned by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every_n_steps: int) -> None:
        self.now = 100.0
        for place in (throughput, module):
            monkeypatch.setattr(place, "now_s", lambda: self.now)
        loader = StepLoader.__new__(StepLoader)
        loader.__dict__["waited_s"] = 3.0
        self.module = Task()
        self.trainer: Any = SimpleNamespace(
            global_step=10, world_size=2, train_dataloader=loader, lightning_module=self.module
        )
        self.callback = Throughput(every_n_steps)
        self.callback.on_train_start(self.trainer, self.module)

    @property
    def logged(self) -> list[dict[str, float]]:
        """What was logged, by logging: each begins with the same column."""
        entries: list[dict[str, float]] = []
        for name, value in self.module.logged:
            if not entries or name in entries[-1]:
                entries.append({})
            entries[-1][name] = value
        return entries

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


def test_validation_and_untimed_blocks_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, every_n_steps=2)
    rig.micro_step(0.0, 1.0)
    rig.callback.on_validation_start(rig.trainer, rig.module)
    rig.now += 1000.0
    rig.callback.on_validation_end(rig.trainer, rig.module)
    with rig.module.untimed():
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
