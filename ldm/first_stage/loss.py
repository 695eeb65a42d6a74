"""The loss that trains a first stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.criterion import L1, Criterion
from ldm.errors import UserError
from ldm.first_stage.autoencoder import FirstStage, Reconstruction
from ldm.first_stage.perceptual import PerceptualDistance
from ldm.first_stage.regularizer import Regularizer

Logs = dict[str, Tensor]
MAX_ADAPTIVE_WEIGHT = 1e4


class FirstStageLoss(nn.Module):
    """Reconstruction, regularizer and adversarial losses of an autoencoder, in turn with its discriminator.

    The adversarial term is scaled to the reconstruction's gradient at the decoder's last layer (`adaptive_weight`).

    Args:
        perceptual: the perceptual distance, None for none. A distance d counts as d on every value.
        perceptual_weight: its weight.
        discriminator: images to logits, None for none.
        discriminator_start_steps: the first step of autoencoder and discriminator with an adversarial loss.
        discriminator_weight: factor on the adaptive weight.
        pixel: the loss per value, None for L1.
        reduction: the reconstruction loss of an image is the sum over its values, as LDM has it for KL, or their
            mean, as for VQ; None for the regularizer's. The regularizer's weights are relative to it.

    Source: Esser et al. 2021 (VQGAN), eq. 6 and 7; LDM's `LPIPSWithDiscriminator` (sums) and
    `VQLPIPSWithDiscriminator` (means), hinge losses.
    """

    def __init__(
        self,
        perceptual: PerceptualDistance | None = None,
        perceptual_weight: float = 1.0,
        discriminator: nn.Module | None = None,
        discriminator_start_steps: int = 50001,
        discriminator_weight: float = 0.5,
        pixel: Criterion | None = None,
        reduction: Literal["sum", "mean"] | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean", None):
            raise UserError(f"reduction={reduction}: expected sum, mean or null (the regularizer's)")
        if discriminator_start_steps < 0:
            raise UserError(f"discriminator_start_steps={discriminator_start_steps}: give 0 or more steps")
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.discriminator_start_steps = discriminator_start_steps
        self.discriminator_weight = discriminator_weight
        self.pixel = pixel or L1()
        self.reduction = reduction

    def adversarial_at(self, step: int) -> bool:
        """Whether there is an adversarial loss at this (autoencoder) step."""
        return self.discriminator is not None and step >= self.discriminator_start_steps

    def generator(
        self, images: Tensor, reconstruction: Reconstruction, step: int, first_stage: FirstStage
    ) -> tuple[Tensor, Logs]:
        """The autoencoder's loss, a scalar, and its parts to log.

        images [B, 3, H, W] in [-1, 1]. The discriminator's weights get no gradient from this loss.
        """
        nll, logs = self._reconstruction(images, reconstruction.images, first_stage.regularizer)
        loss = nll + reconstruction.regularized.loss
        logs |= reconstruction.regularized.logs
        if self.discriminator is not None and self.adversarial_at(step):
            with _frozen(self.discriminator):
                logits = self.discriminator(reconstruction.images)
            adversarial = -logits.to(torch.float32).mean()
            weight = self.discriminator_weight * adaptive_weight(nll, adversarial, first_stage.last_layer)
            loss = loss + weight * adversarial
            logs |= {"adversarial": adversarial.detach(), "adversarial_weight": weight}
        return loss, {"loss": loss.detach(), **logs}

    def discriminator_loss(self, images: Tensor, reconstructions: Tensor, step: int) -> tuple[Tensor, Logs]:
        """The discriminator's hinge loss, a scalar, and its parts to log; for steps with `adversarial_at`.

        images and reconstructions [B, 3, H, W] in [-1, 1]; no gradient flows to the autoencoder.
        """
        if self.discriminator is None or not self.adversarial_at(step):
            raise UserError(f"step {step} has no discriminator loss; ask adversarial_at(step) first")
        real = self.discriminator(images.detach()).to(torch.float32)
        fake = self.discriminator(reconstructions.detach()).to(torch.float32)
        loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        logs = {"real": real.detach().mean(), "fake": fake.detach().mean(), "loss": loss.detach()}
        return loss, {f"discriminator_{name}": value for name, value in logs.items()}

    def _reconstruction(self, images: Tensor, reconstructions: Tensor, regularizer: Regularizer) -> tuple[Tensor, Logs]:
        """Pixel and perceptual losses summed (or averaged) over an image's values and averaged over the batch."""
        reconstructions = reconstructions.to(torch.float32)
        pixel = self.pixel(reconstructions - images.to(torch.float32)).mean()  # per value
        logs = {"pixel": pixel.detach()}
        per_value = pixel
        if self.perceptual is not None:
            distance = self.perceptual(reconstructions, images).mean()
            logs["perceptual"] = distance.detach()
            per_value = per_value + self.perceptual_weight * distance
        reduction = self.reduction or regularizer.reduction
        return per_value * images[0].numel() if reduction == "sum" else per_value, logs


def adaptive_weight(nll: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """||grad nll|| / (||grad adversarial|| + 1e-4) at the last layer, within [0, 1e4], without gradient.

    Norms in float32. Where the reconstruction's gradient is not a number the weight is 0, so that it does not
    spread through the adversarial term. Source: Esser et al. 2021, eq. 7.
    """
    nll_norm = torch.autograd.grad(nll, last_layer, retain_graph=True)[0].to(torch.float32).norm()
    adversarial_norm = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].to(torch.float32).norm()
    ratio = nll_norm / (adversarial_norm + 1e-4)
    return torch.nan_to_num(ratio, nan=0.0).clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Lets gradients pass through the module to its input, but not to its weights."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
