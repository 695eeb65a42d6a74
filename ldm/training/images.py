"""Pictures during training, as a callback: what the averaged model makes of fixed prompts or pictures."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from ldm.data.loading.batch import Batch
from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.loading.loader import ValBatches
from ldm.errors import UserError
from ldm.generation import SamplingSettings
from ldm.training.ema import averaged
from ldm.training.loggers import log_image
from ldm.training.module import Preview, TrainingModule


class ImageLogger(pl.Callback):
    """Writes `folder/step_N.png` every so many steps and after the last one, and gives it to the loggers.

    A second stage draws samples of fixed prompts, picture i with the seed `seed + i`; a first stage draws
    reconstructions. Rank 0 draws, with the EMA's weights where there is an EMA. Training is not affected: weights and
    modes are put back, and no generator's state is used.

    prompts    texts, repeated up to `n`; None: the captions of the first validation samples (of training samples,
               where there is no validation set)
    sampling   how samples are made
    """

    def __init__(
        self,
        folder: str,
        sampling: SamplingSettings,
        every_n_steps: int = 1000,
        prompts: Sequence[str] | None = None,
        n: int = 8,
        seed: int = 0,
    ) -> None:
        if every_n_steps < 1 or n < 1:
            raise UserError(
                f"callbacks.images: every_n_steps={every_n_steps}, n={n}: give 1 or more (callbacks.images=null: none)"
            )
        if prompts is not None and not prompts:
            raise UserError("callbacks.images.prompts=[]: give one or more, or null for the validation captions")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.preview = Preview(prompts, n, seed, sampling)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if step % self.every_n_steps and step != trainer.max_steps:
            return
        if not isinstance(pl_module, TrainingModule):
            return
        path = self.folder / f"step_{step:08d}.png"
        with (
            pl_module.untimed(),
            averaged(trainer),
            _eval_mode(pl_module),
            trainer.precision_plugin.forward_context(),
            torch.compiler.set_stance("force_eager"),  # other shapes than in training: not worth compiling
        ):
            samples = _first_samples(trainer.datamodule, self.preview.n)  # type: ignore[attr-defined]
            drawn = pl_module.draw_preview(path, samples, self.preview)
        if drawn:
            for logger in trainer.loggers:
                log_image(logger, self.folder.name, path, step)


def _first_samples(datamodule: ShardDataModule, n: int) -> Batch:
    fetcher = datamodule.train_fetcher if datamodule.val is None else datamodule.val_fetcher
    return ValBatches(fetcher, min(n, len(fetcher.manifest)), n)[0]


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Every part in eval mode for a `with` block, then each in the mode that it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
