"""The noise of a sampling run: that of image i depends on its seed alone, not on its batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.randomness import fold, key, normal


class ImageNoise:
    """Standard normal noise for images by their seeds; the n-th draw of a seed is always the same."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        rng_keys = [key("sample", seed) for seed in seeds]
        self._rng_keys = torch.tensor(rng_keys, dtype=torch.int64, device=device)
        self._draws = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """The next noise [B, *shape], float32: row i from seed i."""
        self._draws += 1
        return normal(fold(self._rng_keys, f"draw {self._draws}"), shape)
