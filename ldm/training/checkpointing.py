"""Training checkpoints: written whole or not at all, on a schedule and when the run is asked to stop."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from ldm.checkpoint import keep_last, write_atomic
from ldm.data.datamodule import ShardDataModule
from ldm.errors import UserError

PATTERN = "step=*.ckpt"


class Checkpoints(pl.Callback):
    """Saves `folder/step=N.ckpt` every so many steps and, asked by SIGTERM or Ctrl-C, before stopping.

    A file has its final name only when it is complete on disk, so a killed run leaves nothing torn. The
    last `keep` are kept. A second Ctrl-C stops at once.
    """

    def __init__(self, folder: Path, every_n_steps: int = 1000, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise UserError(f"checkpoints: every_n_steps={every_n_steps} and keep={keep} have to be 1 or more")
        self.folder = folder
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
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, ShardDataModule):
            datamodule.advance(step)  # with the optimizer, never with the loader, which reads ahead
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
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self._handlers:
            signal.signal(number, self._ask)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the signals back, however the run ended."""
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
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step={step:08d}.ckpt"
        if trainer.is_global_zero:
            with write_atomic(final) as temporary:
                trainer.save_checkpoint(temporary)
            keep_last(self.folder, self.keep, PATTERN)
        else:
            trainer.save_checkpoint(final)  # takes part in what is collective; rank 0 writes
        self._saved_step = step
        trainer.strategy.barrier("checkpoint saved")
