"""How fast training is: images a second, seconds a step, and the share of it spent waiting for data."""

from typing import Any

import pytorch_lightning as pl
import torch

from ldm.data.loading.loader import StepLoader
from ldm.training.clock import now_s
from ldm.training.module import TrainingModule


class Throughput(pl.Callback):
    """Logs what the steps since the last time took, under `throughput/`.

    every_n_steps should be the trainer's `log_every_n_steps`; 0 logs nothing. In the log are

    images_per_s        of all ranks
    seconds_per_step    of an optimizer step
    data_wait_share     of that time, the share in which the loop stood still for the loader (rank 0's)
    peak_memory_gib     on a GPU: the most that was allocated since the start

    The time is the clock's, everything included (checkpoints, logging) but validation and the module's `untimed`
    blocks. The first step of a start, which compiles and warms up, is left out. The images per second stand on the
    progress bar.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._step = 0  # the last that was seen
        self._images = 0  # since the mark
        self._untimed_s = 0.0  # of the module, at the mark
        self._mark: tuple[int, float, float] | None = None  # step, clock, seconds waited
        self._validation_started = 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_started = now_s()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _module(trainer).untimed_s += now_s() - self._validation_started

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self._mark = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch.images) * trainer.world_size
        step = trainer.global_step
        if step == self._step:
            return  # in the middle of an accumulation
        self._step = step
        if self._mark is None:
            self._set_mark(trainer)
        elif self.every_n_steps and step % self.every_n_steps == 0:
            for name, value in self._measured(trainer).items():
                pl_module.log(f"throughput/{name}", value)
            self._set_mark(trainer)

    def _measured(self, trainer: pl.Trainer) -> dict[str, float]:
        assert self._mark is not None
        step, clock, waited = self._mark
        seconds = now_s() - clock - (_module(trainer).untimed_s - self._untimed_s)
        found = {
            "images_per_s": self._images / seconds,
            "seconds_per_step": seconds / (self._step - step),
            "data_wait_share": (_waited(trainer) - waited) / seconds,
        }
        if torch.cuda.is_available():
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return found

    def _set_mark(self, trainer: pl.Trainer) -> None:
        self._mark = (self._step, now_s(), _waited(trainer))
        self._images, self._untimed_s = 0, _module(trainer).untimed_s


def _waited(trainer: pl.Trainer) -> float:
    loader = trainer.train_dataloader
    return loader.waited_s if isinstance(loader, StepLoader) else 0.0


def _module(trainer: pl.Trainer) -> TrainingModule:
    module = trainer.lightning_module
    assert isinstance(module, TrainingModule)
    return module
