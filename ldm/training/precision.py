"""Lightning's bfloat16 precision, with gradient clipping where the optimizer is fused."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.precision import MixedPrecision, Precision


class Bfloat16Mixed(MixedPrecision):
    """`bf16-mixed` that clips gradients whatever the optimizer is.

    Lightning refuses to clip for a fused optimizer, since that one may undo a loss scale within its step. bfloat16
    has no loss scale, so there is nothing to wait for.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Clips as without mixed precision."""
        Precision.clip_gradients(self, *args, **kwargs)


def let_clip(trainer: pl.Trainer) -> None:
    """Puts `Bfloat16Mixed` in place of Lightning's own where a trainer has that; float16 stays as it is."""
    plugin = trainer.precision_plugin
    if type(plugin) is MixedPrecision and plugin.scaler is None:
        trainer.strategy.precision_plugin = Bfloat16Mixed(plugin.device)
