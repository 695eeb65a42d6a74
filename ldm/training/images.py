"""Sheets of pictures during training: what the averaged model makes of fixed prompts or pictures."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import nn

from ldm.data.loading.batch import Batch
from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.loading.fetch import View
from ldm.data.loading.loader import ValBatches
from ldm.errors import UserError
from ldm.evaluation.grids import labelled_grid, paired_grid
from ldm.first_stage.autoencoder import FirstStage
from ldm.generation import Generator, Request, SamplingSettings
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.ema import EMA
from ldm.training.module import TrainingModule
from ldm.training.weights_and_biases import WeightsAndBiases

Pause = Callable[[], AbstractContextManager[None]]


class Sheets(pl.Callback, ABC):
    """Writes `folder/step_N.png` every so many steps and after the last one, on rank 0, with `ema`'s weights.

    Training does not notice: weights and modes are put back, and no generator's state is drawn from.
    `paused` is a context in which the time does not count as training.
    """

    def __init__(
        self, folder: Path, every_n_steps: int, n: int = 8, ema: EMA | None = None, paused: Pause = nullcontext
    ) -> None:
        if every_n_steps < 1 or n < 1:
            raise UserError(f"samples: every_n_steps={every_n_steps} and n={n} have to be 1 or more (null: no sheets)")
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.n = n
        self.ema = ema
        self.paused = paused

    @abstractmethod
    def draw(self, module: TrainingModule, datamodule: ShardDataModule, path: Path) -> None:
        """Writes the sheet of a module in eval mode, whose weights are the averaged ones."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if step % self.every_n_steps and step != trainer.max_steps:
            return
        module = cast(TrainingModule, pl_module)
        path = self.folder / f"step_{step:08d}.png"
        averaged = self.ema.swapped_in(module) if self.ema else nullcontext()
        with (
            self.paused(),
            averaged,
            _in_eval_mode(module),
            trainer.precision_plugin.forward_context(),
            torch.compiler.set_stance("force_eager"),  # other shapes than in training: not worth compiling
        ):
            self.draw(module, trainer.datamodule, path)  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if isinstance(logger, WeightsAndBiases):
                logger.log_sheet(path, step)


class SampleSheets(Sheets):
    """Samples of fixed prompts with fixed seeds; picture i has the seed `seed + i`.

    Without prompts they are the captions of the first validation samples (training samples where there are none).
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        settings: SamplingSettings,
        prompts: Sequence[str] | None = None,
        n: int = 8,
        seed: int = 0,
        ema: EMA | None = None,
        paused: Pause = nullcontext,
    ) -> None:
        """Takes `prompts` from the first again where there are fewer than `n`."""
        super().__init__(folder, every_n_steps, n, ema, paused)
        if prompts is not None and not prompts:
            raise UserError("samples.prompts=[]: give at least one, or null for the captions of validation samples")
        self.settings = settings
        self.prompts = prompts
        self.seed = seed

    def draw(self, module: TrainingModule, datamodule: ShardDataModule, path: Path) -> None:
        requests = self._requests(datamodule)
        generator = Generator(cast(LatentDiffusion, module.export_module))
        images = list(generator.generate(requests, View.of(datamodule.size).size, self.settings))
        labelled_grid(images, [" / ".join(request.fields.values()) for request in requests], path)

    def _requests(self, datamodule: ShardDataModule) -> list[Request]:
        if self.prompts is not None:
            chosen = [self.prompts[i % len(self.prompts)] for i in range(self.n)]
            return [Request({"caption": prompt}, self.seed + i) for i, prompt in enumerate(chosen)]
        given = _first_samples(datamodule, self.n).fields
        fields = {name: values for name, values in given.items() if isinstance(values, list)}
        rows = zip(*fields.values(), strict=True)
        return [Request(dict(zip(fields, row, strict=True)), self.seed + i) for i, row in enumerate(rows)]


class ReconstructionSheets(Sheets):
    """The first validation pictures above what the first stage makes of them (of its mean, without noise)."""

    @torch.inference_mode()
    def draw(self, module: TrainingModule, datamodule: ShardDataModule, path: Path) -> None:
        first_stage = cast(FirstStage, module.export_module)
        images = _first_samples(datamodule, self.n).images.to(module.device)  # [n, 3, H, W]
        decoded = first_stage.decode(first_stage.encode(images)).float()
        paired_grid(images / 2 + 0.5, (decoded / 2 + 0.5).clamp(0, 1), path)


def _first_samples(datamodule: ShardDataModule, n: int) -> Batch:
    fetcher = datamodule.train_fetcher if datamodule.val is None else datamodule.val_fetcher
    return ValBatches(fetcher, min(n, len(fetcher.manifest)), n)[0]


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Every part in eval mode for a `with` block, then each in the mode that it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
