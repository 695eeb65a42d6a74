"""Feature networks, which are never trained."""

from pathlib import Path
from typing import Self

from torch import Tensor, nn

from ldm.checkpoint import load_tensors, load_torch


class FrozenNetwork(nn.Module):
    """A network in evaluation mode whose weights take no gradient; its input does.

    Call `freeze()` at the end of the constructor. `origin` is the file of the weights, "" for random ones.
    """

    origin: str = ""

    def freeze(self) -> None:
        """Stops gradients to the weights and leaves training mode."""
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever a parent module is set to."""
        return super().train(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, C_i, h_i, w_i] of images [B, 3, H, W] in [-1, 1], from fine to coarse."""
        raise NotImplementedError


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` or torch file, on the CPU; UserError where it cannot be read."""
    state: dict[str, Tensor]
    state = load_tensors(path)[0] if str(path).endswith(".safetensors") else load_torch(path)
    return state
