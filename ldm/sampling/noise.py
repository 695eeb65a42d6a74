"""The noise of a sampling run: image i draws from its own seed alone, whatever batch it is in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.randomness import fold, key, normal


class ImageNoise:
    """Standard normal noise for images with the given seeds; the n-th draw of a seed is always the same."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        keys = [key("sample", seed) for seed in seeds]
        self._keys = torch.tensor(keys, dtype=torch.int64, device=device)
        self._draws = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """The next noise [B, *shape], float32: row i from seed i."""
        self._draws += 1
        return normal(fold(self._keys, f"draw {self._draws}"), shape)
