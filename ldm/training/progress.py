"""The progress of a stage: one bar in a terminal, a line now and then in a file."""

import logging
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

BAR = "{desc} {percentage:3.0f}%|{bar}| {n}/{total} {elapsed}<{remaining}{postfix}"


class Progress(ProgressBar):
    """Shows steps done, time left, the loss and the images per second of a stage; log lines stand above the bar.

    stage      its name
    every_s    seconds between two lines where the output is not a terminal
    """

    def __init__(self, stage: str, every_s: float = 60.0) -> None:
        super().__init__()
        self.stage = stage
        self.every_s = every_s
        self._bar: tqdm[Any] | None = None
        self._redirected = ExitStack()
        self._started = self._shown = 0.0
        self._first_step = self._step = 0
        self._untimed_s = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = self._step = trainer.global_step
        self._started = self._shown = time.monotonic()
        self._untimed_s = getattr(pl_module, "untimed_s", 0.0)
        if self._enabled and sys.stderr.isatty():
            self._redirected.enter_context(logging_redirect_tqdm())
            self._bar = tqdm(
                total=trainer.max_steps, initial=self._step, desc=self.stage, dynamic_ncols=True, bar_format=BAR
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        if step == self._step or not self._enabled:
            return
        now, done = time.monotonic(), step - self._step
        self._step = step
        if self._bar is not None:
            if now - self._shown > 0.5 or step == trainer.max_steps:
                self._shown = now
                self._bar.set_postfix_str(self._numbers(trainer, now), refresh=False)
            self._bar.update(done)
        elif now - self._shown > self.every_s or step == trainer.max_steps:
            self._shown = now
            rate = (step - self._first_step) / (now - self._started)
            left = timedelta(seconds=round((trainer.max_steps - step) / rate))
            numbers = self._numbers(trainer, now)
            log.info("%s: step %d of %d, %s, %s left", self.stage, step, trainer.max_steps, numbers, left)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Closes the bar, however the stage ended."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._redirected.close()

    def _numbers(self, trainer: pl.Trainer, now: float) -> str:
        """`loss 0.1234, val/loss 0.1300, 145 images/s`; the rate is the mean since the start."""
        metrics = {name.removeprefix("train/"): value for name, value in trainer.progress_bar_metrics.items()}
        parts = [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)]
        batch = getattr(getattr(trainer, "datamodule", None), "global_batch", None)
        if batch is not None:
            untimed_s = getattr(trainer.lightning_module, "untimed_s", 0.0) - self._untimed_s
            seconds = max(now - self._started - untimed_s, 1e-9)
            parts.append(f"{batch * (self._step - self._first_step) / seconds:.3g} images/s")
        return ", ".join(parts)
