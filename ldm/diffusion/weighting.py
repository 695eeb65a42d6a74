"""Loss weights per noise level, for the squared error of the network's output.

Papers state their weight for the error of x0 or of eps. |out - target| = |det| / sigma |error of x0|, and the error
of eps is alpha / sigma that of x0, so a weight w on x0 is w (sigma / det)^2 on the output, and a weight on eps is
(alpha / det)^2 times itself. Written so, each is finite at sigma = 0 too.
"""

from abc import ABC, abstractmethod
from math import pi

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Level
from ldm.errors import UserError


class Weighting(nn.Module, ABC):
    """A weight for each sample's loss."""

    @abstractmethod
    def weights(self, level: Level, prediction: Prediction) -> Tensor:
        """Weights shaped like the level's alpha, for the squared error of the network's output."""

    def forward(self, errors: Tensor, level: Level, prediction: Prediction) -> Tensor:
        """The losses [B] of errors [B] at their levels [B]."""
        return self.weights(level, prediction).to(errors.dtype) * errors


class Uniform(Weighting):
    """Weight 1 on the network's output: DDPM's simple loss (Ho et al. 2020, eq. 14)."""

    def weights(self, level: Level, prediction: Prediction) -> Tensor:
        return torch.ones_like(level.alpha)


class MinSNR(Weighting):
    """min(SNR, gamma) on the error of x0, whatever the network predicts (Hang et al. 2023)."""

    def __init__(self, gamma: float = 5.0) -> None:
        super().__init__()
        if gamma <= 0:
            raise UserError(f"gamma={gamma}: expected a number above 0 (the paper uses 5)")
        self.gamma = gamma

    def weights(self, level: Level, prediction: Prediction) -> Tensor:
        smaller = (level.alpha**2).minimum(self.gamma * level.sigma**2)
        return smaller / prediction.determinant(level) ** 2


class SoftMinSNR(Weighting):
    """SNR gamma / (SNR + gamma) on the error of x0: min-SNR without its corner (Crowson et al. 2024, HDiT)."""

    def __init__(self, gamma: float = 4.0) -> None:
        super().__init__()
        if gamma <= 0:
            raise UserError(f"gamma={gamma}: expected a number above 0 (the paper uses 4)")
        self.gamma = gamma

    def weights(self, level: Level, prediction: Prediction) -> Tensor:
        alpha2, sigma2 = level.alpha**2, level.sigma**2
        return self.gamma * alpha2 * sigma2 / (alpha2 + self.gamma * sigma2) / prediction.determinant(level) ** 2


class P2(Weighting):
    """1 / (k + SNR)^gamma on the error of eps (Choi et al. 2022): less of the imperceptible details."""

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        super().__init__()
        if gamma < 0 or k <= 0:
            raise UserError(f"gamma={gamma}, k={k}: expected gamma of 0 or more and k above 0 (the paper: 1, 1)")
        self.gamma, self.k = gamma, k

    def weights(self, level: Level, prediction: Prediction) -> Tensor:
        alpha2, sigma2 = level.alpha**2, level.sigma**2
        damping = (sigma2 / (self.k * sigma2 + alpha2)) ** self.gamma
        return damping * alpha2 / prediction.determinant(level) ** 2


class EDM(Weighting):
    """(s^2 + s_d^2) / (s s_d)^2 on the error of x0, s = sigma / alpha (Karras et al. 2022, table 1).

    With prediction=edm and the same sigma_data it is 1 on the network's output.
    """

    def __init__(self, sigma_data: float = 1.0) -> None:
        super().__init__()
        if sigma_data <= 0:
            raise UserError(f"sigma_data={sigma_data}: expected a number above 0 (normalised latents have 1)")
        self.sigma_data = sigma_data

    def weights(self, level: Level, prediction: Prediction) -> Tensor:
        variance = level.sigma**2 + (self.sigma_data * level.alpha) ** 2
        return variance / (self.sigma_data * prediction.determinant(level)) ** 2


class LearnedUncertainty(Weighting):
    """Another weighting's loss L as L / e^u + u, u(level) learned (Karras et al. 2024, EDM2; Kendall et al. 2018).

    The best u is the logarithm of the level's mean loss, so every level comes to contribute alike. u is a sum of
    `channels` cosines over log-SNR from -20 to 20, and starts at 0. The reported loss may be negative.
    """

    def __init__(self, weighting: Weighting, channels: int = 32) -> None:
        super().__init__()
        if channels < 1:
            raise UserError(f"channels={channels}: expected 1 or more")
        self.weighting = weighting
        self.factors = nn.Parameter(torch.zeros(channels))

    def log_variance(self, level: Level) -> Tensor:
        """u, shaped like the level's alpha, float32."""
        place = (level.log_snr.clamp(-20.0, 20.0).to(self.factors) + 20.0) / 40.0  # [B] in [0, 1]
        orders = torch.arange(len(self.factors), device=place.device, dtype=place.dtype)
        return torch.cos(pi * place[..., None] * orders) @ self.factors

    def weights(self, level: Level, prediction: Prediction) -> Tensor:
        return self.weighting.weights(level, prediction) * torch.exp(-self.log_variance(level))

    def forward(self, errors: Tensor, level: Level, prediction: Prediction) -> Tensor:
        return super().forward(errors, level, prediction) + self.log_variance(level).to(errors.dtype)
