"""Latent regularizers: KL (diagonal Gaussian) and VQ (codebook)."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldm.errors import UserError

CHUNK_pixels = 4096  # whose distances to the codebook are computed at once


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where it is in half precision; float32 and float64 are unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RegularizerOutput(NamedTuple):
    """A regularizer's output in training."""

    sample: Tensor  # [B, C, h, w], for the decoder
    loss: Tensor  # the batch's mean, weighted, in float32 at least
    logs: dict[str, Tensor]  # scalars, unweighted; `regularizer` is the loss without its weight


class Regularizer(nn.Module, ABC):
    """Turns the encoder's features [B, in_factor * C, h, w] into latents [B, C, h, w]."""

    in_factor: int = 1
    channels: int | None = None
    """C, where the regularizer has a fixed one."""
    reduction: ClassVar[Literal["sum", "mean"]] = "mean"
    """Whether the reconstruction loss next to its own is a sum over an image's values, or their mean (LDM's models)."""

    @abstractmethod
    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the second stage's latents, each [B, C, h, w] in float32 at least."""

    def sample(self, h: Tensor, noise: Tensor | None = None) -> Tensor:
        """The second stage's latents: mean + std * noise, with standard normal noise [B, C, h, w]; else the mean."""
        mean, std = self.posterior(h)
        return mean if noise is None else mean + std * noise

    @abstractmethod
    def forward(self, h: Tensor, noise: Tensor | None = None) -> RegularizerOutput:
        """The training path: the decoder's input, the weighted loss and numbers to log."""

    def initialise(self, quant_conv: nn.Module) -> None:
        """Set the initial weights of the convolution before the regularizer; unchanged by default."""

    def quantize(self, z: Tensor) -> Tensor:
        """The decoder's input for latents [B, C, h, w]: their codebook entries, or the latents as they are (KL)."""
        return z


class KLRegularizer(Regularizer):
    """A diagonal Gaussian around the encoder's mean, held near N(0, 1) by its KL divergence.

    kl_weight        the weight of the divergence next to the reconstruction loss
    initial_log_var  the initial log variance, where there is a quant_conv; None: random, near 0. A low one (-6) keeps
                     the noise from hiding the latents at the start of a short training

    The features are mean and log variance [B, 2C, h, w]; the log variance is clamped to [-30, 20].
    Source: Kingma and Welling 2014, appendix B; `DiagonalGaussianDistribution` in LDM's code.
    """

    in_factor = 2
    reduction = "sum"

    def __init__(self, kl_weight: float = 1e-6, initial_log_var: float | None = None) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.initial_log_var = initial_log_var

    def initialise(self, quant_conv: nn.Module) -> None:
        """Set the log variance's bias to `initial_log_var` and shrink its weights tenfold."""
        if self.initial_log_var is None or not isinstance(quant_conv, nn.Conv2d):
            return
        half = quant_conv.out_channels // 2
        with torch.no_grad():
            quant_conv.weight[half:] *= 0.1
            if quant_conv.bias is not None:
                quant_conv.bias[half:] = self.initial_log_var

    @staticmethod
    def moments(h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each [B, C, h, w] in float32 at least."""
        mean, log_var = at_least_float32(h).chunk(2, dim=1)
        return mean, log_var.clamp(-30.0, 20.0)

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean and standard deviation."""
        mean, log_var = self.moments(h)
        return mean, torch.exp(0.5 * log_var)

    def forward(self, h: Tensor, noise: Tensor | None = None) -> RegularizerOutput:
        """The sample, its weighted KL divergence from N(0, 1) in nats summed over an image, and logs."""
        mean, log_var = self.moments(h)
        kl = 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).flatten(1).sum(1).mean()  # per image
        std = torch.exp(0.5 * log_var.detach()).mean()
        logs = {"regularizer": kl.detach(), "kl": kl.detach(), "posterior_std": std}
        return RegularizerOutput(self.sample(h, noise), self.kl_weight * kl, logs)


class VQRegularizer(Regularizer):
    """A codebook: each pixel's features are replaced by the nearest of `entries` vectors of `channels` numbers.

    The second stage models the features before that (as LDM does), and `quantize` quantizes its samples. In training
    the gradient passes through the replacement unchanged. The loss per image is the mean squared distance of features
    and entries: `commitment_weight` times with a gradient to the features, `codebook_weight` times with one to the
    entries. Source: van den Oord et al. 2017, eq. 3, has 0.25 and 1; LDM's models were trained with 1 and 0.25
    (`legacy` in its quantizer). Entries are initialised uniformly in [-1 / entries, 1 / entries].
    """

    def __init__(
        self, entries: int, channels: int, commitment_weight: float = 1.0, codebook_weight: float = 0.25
    ) -> None:
        super().__init__()
        if entries < 1 or channels < 1:
            raise UserError(f"entries={entries}, channels={channels}: a codebook needs 1 or more of both")
        self.entries = entries
        self.channels = channels
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.codebook = nn.Embedding(entries, channels)
        nn.init.uniform_(self.codebook.weight, -1.0 / entries, 1.0 / entries)

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """The nearest entry [B, h, w] int64 of each pixel of z [B, C, h, w]."""
        pixels = at_least_float32(z).movedim(1, -1)  # [B, h, w, C]
        book = self.codebook.weight.to(pixels.dtype)
        lengths = book.square().sum(1)
        parts = torch.split(pixels.flatten(0, 2), CHUNK_pixels)
        with torch.autocast(z.device.type, enabled=False):  # rounded products would give other entries
            near = [(lengths - 2.0 * part @ book.T).argmin(1) for part in parts]
        return torch.cat(near).view(pixels.shape[:3])

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The features as they are, and a std of 0."""
        mean = at_least_float32(h)
        return mean, torch.zeros_like(mean)

    def quantize(self, z: Tensor) -> Tensor:
        """The nearest entries of z [B, C, h, w], shaped like it, in float32 at least; gradients go to the entries."""
        quantized: Tensor = at_least_float32(self.codebook(self.indices(z))).movedim(-1, 1)
        return quantized

    def forward(self, h: Tensor, noise: Tensor | None = None) -> RegularizerOutput:
        """The entries, with the features' gradient; the codebook loss; logs with the count of entries in use."""
        z = at_least_float32(h)
        near = self.indices(z)
        entries = at_least_float32(self.codebook(near)).movedim(-1, 1)
        commitment = (z - entries.detach()).square().flatten(1).mean(1)
        codebook = (entries - z.detach()).square().flatten(1).mean(1)
        loss = (self.commitment_weight * commitment + self.codebook_weight * codebook).mean()
        used = torch.tensor(float(len(torch.unique(near))), device=z.device)
        logs = {"regularizer": loss.detach(), "codebook_used": used}
        return RegularizerOutput(z + (entries - z).detach(), loss, logs)
