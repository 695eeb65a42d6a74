"""The progress bar: the stage's name, steps done, rate and time left."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar


class Progress(TQDMProgressBar):
    """Lightning's bar, one for the whole stage, named after it."""

    def __init__(self, stage: str) -> None:
        super().__init__(refresh_rate=10)
        self.stage = stage

    @property
    def total_train_batches(self) -> int | float:
        """The micro-steps of the whole stage: a resumed bar goes on where it was, so it needs them all."""
        return self.trainer.num_training_batches

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.set_description(self.stage)
        return bar

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Starts the one bar of the stage (an epoch is the whole run)."""
        super().on_train_epoch_start(trainer, *_)
        self.train_progress_bar.set_description(self.stage)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
