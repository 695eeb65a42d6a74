"""Lightning's checkpoints as folders of safetensors and JSON."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO

from ldm.checkpoint import PathLike, load_state, remove, save_state

FILES = {"state_dict": "model", "optimizer_states": "optimizer", "callbacks/EMA/average": "ema"}
"""Parts of Lightning's checkpoint that have a file of their own."""


class FolderCheckpointIO(CheckpointIO):
    """Writes a checkpoint as a folder, whole or not at all; reads it back once its hashes are right.

    Give it to the Trainer: `Trainer(plugins=[FolderCheckpointIO()])`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any = None) -> None:
        """Writes the folder `path`; UserError where the checkpoint holds more than tensors and plain types."""
        save_state(path, checkpoint, FILES)

    def load_checkpoint(
        self,
        path: PathLike,
        map_location: Callable[..., Any] | torch.device | str | dict[str, str] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """The checkpoint, its tensors on the CPU; UserError where the folder is none, or damaged."""
        checkpoint: dict[str, Any] = load_state(path)
        return checkpoint

    def remove_checkpoint(self, path: PathLike) -> None:
        """Deletes the folder."""
        remove(Path(path))
