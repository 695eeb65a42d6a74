"""An exponential moving average of the trained parameters, as a callback."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.training.module import TrainingModule


class EMA(pl.Callback):
    """Averages what is trained, once per optimizer step; validates and exports with the average.

    The decay at update n is min(decay, (1 + n) / (10 + n)) (CompVis' LitEma), so that a short run's average
    forgets its start. Frozen parts are not copied. The average is kept in float32.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.ema.decay={decay}: expected a number from 0 to below 1 (SD uses 0.9999)")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        parameters = _module(pl_module).trainable_parameters()
        if self.average:  # restored from a checkpoint
            self.average = {name: self.average[name].to(p.device) for name, p in parameters.items()}
        else:
            self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.updates:
            return  # in the middle of an accumulation
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates = trainer.global_step
        current = _module(pl_module).trainable_parameters()
        torch._foreach_lerp_(
            [self.average[name] for name in current],
            [p.detach().float() for p in current.values()],
            1.0 - decay,
        )

    @contextmanager
    def swapped_in(self, module: TrainingModule) -> Iterator[None]:
        """The module with the averaged weights in place of its own, for the length of a `with` block."""
        self._exchange(module)
        try:
            yield
        finally:
            self._exchange(module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average:
            self._exchange(_module(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average:
            self._exchange(_module(pl_module))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = int(state_dict["updates"])
        self.average = dict(state_dict["average"])

    @torch.no_grad()
    def _exchange(self, module: TrainingModule) -> None:
        for name, parameter in module.trainable_parameters().items():
            own = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(own)


@contextmanager
def averaged(trainer: pl.Trainer) -> Iterator[bool]:
    """The trained module with its EMA's weights for a `with` block; False where no EMA is among the callbacks."""
    ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)  # type: ignore[attr-defined]
    if ema is None:
        yield False
        return
    with ema.swapped_in(_module(trainer.lightning_module)):
        yield True


def _module(module: pl.LightningModule) -> TrainingModule:
    if not isinstance(module, TrainingModule):
        raise TypeError(f"EMA averages a TrainingModule's parameters, not {type(module).__name__}'s")
    return module
