"""Criteria: the error of the network's output for each value of its difference from the target."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.errors import UserError


class Criterion(ABC):
    """An error for each value of a difference."""

    @abstractmethod
    def __call__(self, difference: Tensor) -> Tensor:
        """The error of each value, shaped like `difference`, at least 0."""


class L2(Criterion):
    """The squared error: its optimum is the mean, which is what samplers expect of a denoiser."""

    def __call__(self, difference: Tensor) -> Tensor:
        return difference.square()


class L1(Criterion):
    """The absolute error: its optimum is the median (LDM's LSUN-churches)."""

    def __call__(self, difference: Tensor) -> Tensor:
        return difference.abs()


class Huber(Criterion):
    """The square up to `delta`, beyond it a line of the same slope (twice Huber 1964): outliers count for less."""

    def __init__(self, delta: float = 1.0) -> None:
        if delta <= 0:
            raise UserError(f"delta={delta}: expected a number above 0")
        self.delta = delta

    def __call__(self, difference: Tensor) -> Tensor:
        zero = torch.zeros_like(difference)
        return 2.0 * torch.nn.functional.huber_loss(difference, zero, reduction="none", delta=self.delta)
