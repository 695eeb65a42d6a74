"""What every task's LightningModule has: an exported model, addressed randomness, optimizers, frozen parts."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.data.loading.batch import Batch
from ldm.data.loading.datamodule import ShardDataModule
from ldm.first_stage.autoencoder import FirstStage
from ldm.generation import SamplingSettings
from ldm.randomness import key
from ldm.training.clock import now_s
from ldm.training.frozen import FrozenPart, frozen_parts, leave_out, put_back

MakeOptimizer = Callable[..., torch.optim.Optimizer]
"""Makes an optimizer of parameters, or of `named_parameters`, see `TrainingModule.configure_with`."""
MakeLRSchedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass(frozen=True)
class Preview:
    """What a picture of a model's state shows: prompts (None: the captions of validation samples), how, which seeds."""

    prompts: Sequence[str] | None
    n: int
    seed: int
    sampling: SamplingSettings


class TrainingModule(pl.LightningModule, ABC):
    """A task: what is trained, and which part of it is the finished model.

    A custom one gives `export_module`, `exported`, `training_step` and `configure_optimizers` (by
    `configure_with`), and what it needs of the rest.
    """

    kind: str = "diffusion"
    """What the finished model is: "first_stage" or "diffusion"."""
    exported: str = "latent_diffusion"
    """The constructor argument that is the finished model; its configuration goes into the model folder."""
    objective: str = "val/loss"
    """The logged column that tells how good a run is: what a sweep's table shows."""
    unused_parameters: bool = False
    """Whether a step may leave parameters without a gradient, so that DDP has to look for them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.untimed_s = 0.0
        """Seconds so far that are not training: validation's and the callbacks' in `untimed`."""
        self._frozen: dict[str, FrozenPart] = {}

    @property
    def export_module(self) -> nn.Module:
        """The part that is exported when training is over."""
        module: nn.Module = getattr(self, self.exported)
        return module

    @abstractmethod
    def compiled_networks(self) -> list[nn.Module]:
        """The networks that `compile=true` compiles, in place."""

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The model's trainable parameters by name: those that are averaged and exported."""
        return {name: p for name, p in self.export_module.named_parameters() if p.requires_grad}

    def finalize(self, datamodule: ShardDataModule) -> dict[str, Any]:
        """Completes the model after the last step (EMA weights are in); returns facts for its record."""
        return {}

    def draw_preview(self, path: Path, batch: Batch, preview: Preview) -> bool:
        """Writes a PNG that shows the model in its present state; False where the task has no such picture.

        The module is in eval mode. `batch` has the first validation samples.
        """
        return False

    def setup(self, stage: str) -> None:
        """Notes the frozen parts, before the trainer casts or moves anything."""
        self._frozen = frozen_parts(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Names the frozen parts in place of their weights."""
        leave_out(checkpoint, self._frozen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes the checkpoint; UserError where the frozen parts are not those that it was trained with."""
        put_back(checkpoint, self._frozen, self.state_dict())

    def check_data(self, first_stage: FirstStage, fingerprint: str | None) -> None:
        """UserError where the first stage can't divide the pictures' size, or latents are not by `fingerprint`."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, ShardDataModule):
            for size in datamodule.sizes:
                first_stage.check_size(*size)
            datamodule.check_first_stage(fingerprint)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Gives dropout inside the networks the address (seed, micro step, rank)."""
        torch.manual_seed(key(self.seed, "network", batch_idx, self.global_rank) & 0x7FFFFFFFFFFFFFFF)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """A `with` block whose time does not count as training."""
        started = now_s()
        try:
            yield
        finally:
            self.untimed_s += now_s() - started

    def log_train(self, values: Mapping[str, Tensor | float], batch_size: int, on_bar: str = "loss") -> None:
        """Logs scalars of a training step under `train/`; the one named `on_bar` stands on the progress bar too."""
        for name, value in values.items():
            self.log(f"train/{name}", value, batch_size=batch_size, prog_bar=name == on_bar)

    def configure_with(
        self,
        make_optimizer: MakeOptimizer,
        make_lr_schedule: MakeLRSchedule | None,
        parameters: Iterable[tuple[str, nn.Parameter]],
    ) -> dict[str, Any]:
        """Lightning's dictionary for one optimizer and its schedule, which advances every step.

        The optimizer gets the parameters; one whose argument is called `named_parameters` gets (name, parameter) pairs.
        """
        named = [(name, p) for name, p in parameters if p.requires_grad]
        if "named_parameters" in inspect.signature(make_optimizer).parameters:
            optimizer = make_optimizer(named_parameters=named)
        else:
            optimizer = make_optimizer([p for _, p in named])
        if make_lr_schedule is None:
            return {"optimizer": optimizer}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make_lr_schedule(optimizer), "interval": "step"},
        }
