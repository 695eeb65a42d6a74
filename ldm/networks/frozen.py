"""Networks that give features and are never trained."""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from ldm.errors import UserError


class FrozenNetwork(nn.Module):
    """A network in evaluation mode whose weights take no gradient; its input does.

    Call `freeze()` at the end of the constructor.
    """

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
    """The state dict in a `.safetensors` or torch file, on the CPU; UserError where there is no file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}; give the path of a .pth or .safetensors file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state
