"""Training checkpoints: on a schedule, when the run is asked to stop, and at its end."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from ldm.checkpoint import keep_last
from ldm.data.loading.datamodule import ShardDataModule
from ldm.errors import UserError

PATTERN = "step_*"


class DataPosition(pl.Callback):
    """Advances the data module with the optimizer's steps: never with the loader, which reads ahead.

    It has to come before every callback that saves a checkpoint.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, ShardDataModule):
            datamodule.advance(trainer.global_step)


class Checkpoints(Checkpoint):
    """Saves `folder/step_N` every so many steps, on SIGTERM or Ctrl-C before stopping, and at the end.

    The end is the last step, or an early one (`max_time`, another callback). The last `keep` are kept. A second
    Ctrl-C stops at once. The trainer needs a FolderCheckpointIO, which writes whole or not at all. Lightning runs it
    after all other callbacks, so that their states in the checkpoint are of the same step.
    """

    def __init__(self, folder: str, every_n_steps: int = 1000, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise UserError(f"callbacks.checkpoints: every_n_steps={every_n_steps}, keep={keep}: give 1 or more")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.stopped_by: int | None = None
        self._signal: int | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._saved_step = -1
        self._seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def train_seconds(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self._seconds_before + time.monotonic() - self._started

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._saved_step or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = self._asked_to_stop(trainer, step)
        if stop or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._save(trainer, step)
        if stop:
            self.stopped_by = self._signal or signal.SIGTERM
            trainer.should_stop = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes SIGTERM and SIGINT as a request to save and stop; Lightning has put its own handlers by now."""
        self._saved_step = trainer.global_step
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self._handlers:
            signal.signal(number, self._ask)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves where training ended early without an error."""
        if trainer.global_step != self._saved_step:
            self._save(trainer, trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Marks the epoch as unfinished, since it is the whole run: at the end Lightning has counted it as done."""
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        for count in (epochs["total"], epochs["current"]):
            count["processed"] = count["completed"] = 0

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores the signal handlers, however the run ended."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def state_dict(self) -> dict[str, Any]:
        return {"train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = float(state_dict["train_seconds"])

    def _asked_to_stop(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether any rank was asked; several ranks agree every 10 steps, one decides for itself."""
        asked = self._signal is not None
        if trainer.world_size == 1:
            return asked
        return step % 10 == 0 and trainer.strategy.reduce_boolean_decision(asked, all=False)

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        trainer.save_checkpoint(self.folder / f"step_{step:08d}", weights_only=False)  # on every rank; rank 0 writes
        if trainer.is_global_zero:
            keep_last(self.folder, self.keep, PATTERN)
        self._saved_step = step
        trainer.strategy.barrier("checkpoints tidied")
