"""The noise of a sampling run: image i draws from its own seed alone, whatever batch it is in."""

import torch
from torch import Tensor

from ldm.randomness import key, normal


class ImageNoise:
    """Standard normal noise for images with the given seeds; the n-th draw of a seed is always the same."""

    def __init__(self, seeds: list[int], device: torch.device | str = "cpu") -> None:
        self.seeds = seeds
        self.device = torch.device(device)
        self._draws = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """The next noise [B, *shape], float32: row i from seed i."""
        addresses = [key("sample", seed, self._draws) for seed in self.seeds]
        self._draws += 1
        return normal(torch.tensor(addresses, dtype=torch.int64, device=self.device), shape)
