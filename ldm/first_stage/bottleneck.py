"""What lies between encoder and decoder, and what it costs."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Bottlenecked(NamedTuple):
    """What comes out of a bottleneck in training."""

    z: Tensor  # [B, C, h, w], for the decoder
    loss: Tensor  # [B], float32
    logs: dict[str, Tensor]  # scalars


class Bottleneck(nn.Module, ABC):
    """Turns the encoder's features [B, in_factor * C, h, w] into latents [B, C, h, w]."""

    in_factor: int = 1

    @abstractmethod
    def latents(self, h: Tensor, noise: Tensor | None = None) -> Tensor:
        """What the second stage models: z [B, C, h, w], float32, differentiable."""

    @abstractmethod
    def forward(self, h: Tensor, noise: Tensor | None = None) -> Bottlenecked:
        """The training path: what the decoder gets, the loss per image and numbers to log."""

    def initialise(self, quant_conv: nn.Module) -> None:
        """Sets what the convolution before the bottleneck starts from; as it is, where nothing is to set."""

    def finish(self, z: Tensor) -> Tensor:
        """What the decoder gets of latents [B, C, h, w]; a codebook would quantise here."""
        return z


class KLBottleneck(Bottleneck):
    """A diagonal Gaussian around the encoder's mean, held near N(0, 1) by its KL divergence.

    `initial_log_var` is where the log variance starts, where there is a quant_conv; None leaves its random
    start, near 0. A low one (-6) lets a short training begin with latents that are not drowned in noise.

    The features are mean and log variance [B, 2C, h, w]; the log variance is clamped to [-30, 20].
    Source: Kingma and Welling 2014, appendix B; `DiagonalGaussianDistribution` in LDM's code.
    """

    in_factor = 2

    def __init__(self, initial_log_var: float | None = None) -> None:
        super().__init__()
        self.initial_log_var = initial_log_var

    def initialise(self, quant_conv: nn.Module) -> None:
        """Puts the log variance's bias at `initial_log_var` and shrinks its weights tenfold."""
        if self.initial_log_var is None or not isinstance(quant_conv, nn.Conv2d):
            return
        half = quant_conv.out_channels // 2
        with torch.no_grad():
            quant_conv.weight[half:] *= 0.1
            if quant_conv.bias is not None:
                quant_conv.bias[half:] = self.initial_log_var

    @staticmethod
    def moments(h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each [B, C, h, w] in float32."""
        mean, log_var = h.to(torch.float32).chunk(2, dim=1)
        return mean, log_var.clamp(-30.0, 20.0)

    def latents(self, h: Tensor, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise, with standard normal noise [B, C, h, w]; the mean without noise."""
        mean, log_var = self.moments(h)
        return mean if noise is None else mean + torch.exp(0.5 * log_var) * noise

    def forward(self, h: Tensor, noise: Tensor | None = None) -> Bottlenecked:
        """The sample, its KL divergence from N(0, 1) in nats summed over the image [B], and logs."""
        mean, log_var = self.moments(h)
        kl = 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).flatten(1).sum(1)
        logs = {"kl": kl.detach().mean(), "posterior_std": torch.exp(0.5 * log_var.detach()).mean()}
        return Bottlenecked(self.latents(h, noise), kl, logs)
