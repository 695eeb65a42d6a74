"""What lies between encoder and decoder, and what it costs."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.errors import UserError

CHUNK_pixels = 4096  # of which distances to a codebook are computed at once


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where it is in half precision; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RegularizerOutput(NamedTuple):
    """What comes out of a regularizer in training."""

    z: Tensor  # [B, C, h, w], for the decoder
    loss: Tensor  # [B], float32; float64 of features in float64
    logs: dict[str, Tensor]  # scalars


class Regularizer(nn.Module, ABC):
    """BucketSchedule the encoder's features [B, in_factor * C, h, w] into latents [B, C, h, w]."""

    in_factor: int = 1
    channels: int | None = None
    """C, where the regularizer is made for one."""
    loss_weight: float = 1.0
    """What its loss is weighed with beside the reconstruction's, in LDM's models."""
    sums_values: bool = False
    """Whether the reconstruction's loss is then summed over an image's values, or their mean."""

    @abstractmethod
    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std, each [B, C, h, w] in float32 at least, that the second stage's latents are drawn with."""

    def sample(self, h: Tensor, noise: Tensor | None = None) -> Tensor:
        """What the second stage models: mean + std * noise, with standard normal noise [B, C, h, w]; else the mean."""
        mean, std = self.posterior(h)
        return mean if noise is None else mean + std * noise

    @abstractmethod
    def forward(self, h: Tensor, noise: Tensor | None = None) -> RegularizerOutput:
        """The training path: what the decoder gets, the loss per image and numbers to log."""

    def initialise(self, quant_conv: nn.Module) -> None:
        """Sets what the convolution before the regularizer starts from; as it is, where nothing is to set."""

    def quantize(self, z: Tensor) -> Tensor:
        """What the decoder gets of latents [B, C, h, w]; a codebook quantises here."""
        return z


class KLRegularizer(Regularizer):
    """A diagonal Gaussian around the encoder's mean, held near N(0, 1) by its KL divergence.

    `initial_log_var` is where the log variance starts, where there is a quant_conv; None leaves its random
    start, near 0. A low one (-6) lets a short training begin with latents that are not drowned in noise.

    The features are mean and log variance [B, 2C, h, w]; the log variance is clamped to [-30, 20].
    Source: Kingma and Welling 2014, appendix B; `DiagonalGaussianDistribution` in LDM's code.
    """

    in_factor = 2
    loss_weight = 1e-6
    sums_values = True

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
        """Mean and log variance, each [B, C, h, w] in float32 at least."""
        mean, log_var = at_least_float32(h).chunk(2, dim=1)
        return mean, log_var.clamp(-30.0, 20.0)

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean and standard deviation."""
        mean, log_var = self.moments(h)
        return mean, torch.exp(0.5 * log_var)

    def forward(self, h: Tensor, noise: Tensor | None = None) -> RegularizerOutput:
        """The sample, its KL divergence from N(0, 1) in nats summed over the image [B], and logs."""
        mean, log_var = self.moments(h)
        kl = 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).flatten(1).sum(1)
        logs = {"kl": kl.detach().mean(), "posterior_std": torch.exp(0.5 * log_var.detach()).mean()}
        return RegularizerOutput(self.sample(h, noise), kl, logs)


class VQRegularizer(Regularizer):
    """A codebook: each pixel's features are replaced by the nearest of `entries` vectors of `channels` numbers.

    The second stage models the features before that (as LDM does), and `quantize` quantises what it makes. In
    training the gradient passes the replacement as if it were not there. The loss per image is the mean squared
    distance of features and entries, `commitment_weight` times towards the features' side (they move to the
    entries), `codebook_weight` times towards the entries' (they move to the features). Source: van den Oord et
    al. 2017, eq. 3, has 0.25 and 1; LDM's models were trained with 1 and 0.25 (`legacy` in its quantiser).
    Entries begin uniform in [-1 / entries, 1 / entries].
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
        with torch.autocast(z.device.type, enabled=False):  # which would round the products, and find other entries
            near = [(lengths - 2.0 * part @ book.T).argmin(1) for part in parts]
        return torch.cat(near).view(pixels.shape[:3])

    def quantise(self, z: Tensor) -> Tensor:
        """The nearest entries of z [B, C, h, w], shaped like it, in float32 at least; gradients go to the entries."""
        quantised: Tensor = at_least_float32(self.codebook(self.indices(z))).movedim(-1, 1)
        return quantised

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The features as they are, and no deviation: nothing is drawn."""
        mean = at_least_float32(h)
        return mean, torch.zeros_like(mean)

    def quantize(self, z: Tensor) -> Tensor:
        """The nearest entries of latents [B, C, h, w]."""
        return self.quantise(z)

    def forward(self, h: Tensor, noise: Tensor | None = None) -> RegularizerOutput:
        """The entries, with the features' gradient; the codebook loss per image [B]; how many entries are in use."""
        z = at_least_float32(h)
        near = self.indices(z)
        entries = at_least_float32(self.codebook(near)).movedim(-1, 1)
        commitment = (z - entries.detach()).square().flatten(1).mean(1)
        codebook = (entries - z.detach()).square().flatten(1).mean(1)
        loss = self.commitment_weight * commitment + self.codebook_weight * codebook
        used = torch.tensor(float(len(torch.unique(near))), device=z.device)
        return RegularizerOutput(z + (entries - z).detach(), loss, {"codebook_used": used})
