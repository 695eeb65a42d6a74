"""Gradient clipping in bfloat16 with a fused optimizer, which Lightning alone refuses."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.training.precision import Bfloat16Mixed, let_clip

CLIP = 1e-3


class Small(pl.LightningModule):
    """A linear layer with a large gradient, which notes the gradient's norm at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norms: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        out: Tensor = self.layer(batch)
        assert out.dtype == torch.bfloat16
        return 100.0 * out.float().square().sum()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if self.layer.weight.grad is not None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self.norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=True)


def trainer(**more: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", devices=1, max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip


def test_bfloat16_clips_with_a_fused_optimizer() -> None:
    batches = DataLoader(torch.randn(4, 2, 4), batch_size=None)  # type: ignore[arg-type]
    refused = trainer(precision="bf16-mixed", gradient_clip_val=CLIP)
    with pytest.raises(RuntimeError, match="fused"):
        refused.fit(Small(), batches)
    module, clipping = Small(), trainer(precision="bf16-mixed", gradient_clip_val=CLIP)
    let_clip(clipping)
    clipping.fit(module, batches)
    assert clipping.global_step == 2
    assert module.norms and all(norm == pytest.approx(CLIP, rel=1e-2) for norm in module.norms)


def test_other_precisions_stay_as_they_are() -> None:
    plain = trainer()
    let_clip(plain)
    assert type(plain.precision_plugin) is Precision
    mixed = trainer(precision="bf16-mixed")
    let_clip(mixed)
    let_clip(mixed)
    assert type(mixed.precision_plugin) is Bfloat16Mixed
