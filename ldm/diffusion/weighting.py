"""Loss weights per noise level, for the squared error of the network's own output."""

from abc import ABC, abstractmethod

from torch import Tensor

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Level
from ldm.errors import UserError


class Weighting(ABC):
    """A weight for each sample's loss."""

    @abstractmethod
    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        """Weights shaped like the level's alpha, for the error of the network's output."""


class Uniform(Weighting):
    """Weight 1 on the network's output: DDPM's simple loss (Ho et al. 2020, eq. 14)."""

    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        return level.alpha.new_ones(level.alpha.shape)


class MinSNR(Weighting):
    """min(SNR, gamma) on the error of x0, whatever the network predicts (Hang et al. 2023, eq. 5)."""

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise UserError(f"gamma={gamma}: expected a number above 0 (the paper uses 5)")
        self.gamma = gamma

    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        # |out - target| = |det| / sigma |x0 error|, so a weight on x0 is divided by (det / sigma)^2.
        # min(SNR, gamma) sigma^2 / det^2 = min(alpha^2, gamma sigma^2) / det^2: finite at sigma = 0 too.
        smaller = (level.alpha**2).minimum(self.gamma * level.sigma**2)
        return smaller / prediction.determinant(level) ** 2
