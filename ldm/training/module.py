"""What the first and the second stage's LightningModules share."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.data.loading.datamodule import ShardDataModule
from ldm.first_stage.autoencoder import FirstStage
from ldm.randomness import key
from ldm.training.frozen import FrozenPart, frozen_parts, leave_out, put_back

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeLRSchedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class TrainingModule(pl.LightningModule):
    """A LightningModule whose randomness has an address and whose data order follows the optimizer's steps."""

    kind: str
    """What the finished model is: "first_stage" or "diffusion"."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._frozen: dict[str, FrozenPart] = {}

    @property
    def export_module(self) -> nn.Module:
        """The part that is exported when training is over."""
        raise NotImplementedError

    def compile_networks(self) -> None:
        """Compiles what is trained with torch.compile, in place."""
        raise NotImplementedError

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The model's trainable parameters by name: those that are averaged and handed on."""
        return {name: p for name, p in self.export_module.named_parameters() if p.requires_grad}

    def finalize(self, datamodule: ShardDataModule) -> dict[str, Any]:
        """Completes the model after the last step (EMA weights are in); returns facts for its record."""
        return {}

    def setup(self, stage: str) -> None:
        """Notes the frozen parts, before the trainer casts or moves anything."""
        self._frozen = frozen_parts(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Names the frozen parts in the place of their weights."""
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

    def log_train(self, values: Mapping[str, Tensor | float], batch_size: int) -> None:
        """Logs scalars of a training step under `train/`."""
        self.log_dict({f"train/{k}": v for k, v in values.items()}, batch_size=batch_size)

    def configure_with(
        self,
        make_optimizer: MakeOptimizer,
        make_lr_schedule: MakeLRSchedule | None,
        parameters: Iterable[nn.Parameter],
    ) -> dict[str, Any]:
        """Lightning's dictionary for one optimizer and its schedule, which advances every step."""
        optimizer = make_optimizer([p for p in parameters if p.requires_grad])
        if make_lr_schedule is None:
            return {"optimizer": optimizer}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make_lr_schedule(optimizer), "interval": "step"},
        }
