"""The loss that trains a first stage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.first_stage.autoencoder import Reconstruction
from ldm.first_stage.perceptual import PerceptualDistance

Logs = dict[str, Tensor]
PixelLoss = Callable[[Tensor, Tensor], Tensor]
MAX_ADAPTIVE_WEIGHT = 1e4


class L1:
    """The absolute difference of two images, per value."""

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        return (images - target).abs()


class L2:
    """The squared difference of two images, per value."""

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        return (images - target).square()


class FirstStageLoss(nn.Module):
    """Reconstruction, regularizer and adversarial losses of an autoencoder, in turn with its discriminator.

    Sums over the values of an image, divided by the batch, as LDM has it for KL: a perceptual distance d
    counts as d on every value; with `sum_values` off means over the values, as it has it for VQ. The
    adversarial term is scaled to the reconstruction's gradient at the decoder's last layer
    (`adaptive_weight`).

    Args:
        perceptual: the perceptual distance, None for none.
        perceptual_weight: its weight.
        regularizer_weight: of the regularizer's loss: 1e-6 for KL, 1 for a codebook.
        discriminator: images to logits, None for none.
        discriminator_start_steps: the first step of autoencoder and discriminator with an adversarial loss.
        discriminator_weight: factor on the adaptive weight.
        pixel: the loss per value, L1() or L2().
        sum_values: whether the reconstruction loss of an image is a sum over its values, or a mean. The
            regularizer's loss is weighed against it.

    Source: Esser et al. 2021 (VQGAN), eq. 6 and 7; LDM's `LPIPSWithDiscriminator` (sums) and
    `VQLPIPSWithDiscriminator` (means), hinge losses.
    """

    def __init__(
        self,
        perceptual: PerceptualDistance | None = None,
        perceptual_weight: float = 1.0,
        regularizer_weight: float = 1e-6,
        discriminator: nn.Module | None = None,
        discriminator_start_steps: int = 50001,
        discriminator_weight: float = 0.5,
        pixel: PixelLoss | None = None,
        sum_values: bool = True,
    ) -> None:
        super().__init__()
        if discriminator_start_steps < 0:
            raise UserError(f"discriminator_start_steps={discriminator_start_steps}: give 0 or more steps")
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.regularizer_weight = regularizer_weight
        self.discriminator = discriminator
        self.discriminator_start_steps = discriminator_start_steps
        self.discriminator_weight = discriminator_weight
        self.pixel = pixel or L1()
        self.sum_values = sum_values

    def adversarial_at(self, step: int) -> bool:
        """Whether autoencoder and discriminator play against each other at this (autoencoder) step."""
        return self.discriminator is not None and step >= self.discriminator_start_steps

    def generator(
        self, images: Tensor, reconstruction: Reconstruction, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Logs]:
        """The autoencoder's loss, a scalar, and what to log of it.

        images [B, 3, H, W] in [-1, 1]; last_layer is the decoder's last weight. The discriminator's weights
        get no gradient from this loss.
        """
        nll, logs = self._reconstruction(images, reconstruction.images)
        regularizer = reconstruction.regularized.loss.mean()
        loss = nll + self.regularizer_weight * regularizer
        logs |= {"regularizer": regularizer.detach(), **reconstruction.regularized.logs}
        if self.discriminator is not None and self.adversarial_at(step):
            with _frozen(self.discriminator):
                logits = self.discriminator(reconstruction.images)
            adversarial = -logits.to(torch.float32).mean()
            weight = self.discriminator_weight * adaptive_weight(nll, adversarial, last_layer)
            loss = loss + weight * adversarial
            logs |= {"adversarial": adversarial.detach(), "adversarial_weight": weight}
        return loss, {"loss": loss.detach(), **logs}

    def discriminator_loss(self, images: Tensor, reconstructions: Tensor, step: int) -> tuple[Tensor, Logs]:
        """The discriminator's hinge loss, a scalar, and what to log of it; of steps with `adversarial_at`.

        images and reconstructions [B, 3, H, W] in [-1, 1]; no gradient flows to the autoencoder.
        """
        if self.discriminator is None or not self.adversarial_at(step):
            raise UserError(f"step {step} has no discriminator loss; ask adversarial_at(step) first")
        real = self.discriminator(images.detach()).to(torch.float32)
        fake = self.discriminator(reconstructions.detach()).to(torch.float32)
        loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        logs = {"real": real.detach().mean(), "fake": fake.detach().mean(), "loss": loss.detach()}
        return loss, {f"discriminator_{name}": value for name, value in logs.items()}

    def _reconstruction(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Logs]:
        """Pixel and perceptual losses summed (or averaged) over an image's values and averaged over the batch."""
        reconstructions = reconstructions.to(torch.float32)
        pixel = self.pixel(reconstructions, images.to(torch.float32)).mean()  # per value
        logs = {"pixel": pixel.detach()}
        per_value = pixel
        if self.perceptual is not None:
            distance = self.perceptual(reconstructions, images).mean()
            logs["perceptual"] = distance.detach()
            per_value = per_value + self.perceptual_weight * distance
        return per_value * images[0].numel() if self.sum_values else per_value, logs


def adaptive_weight(nll: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """||grad nll|| / (||grad adversarial|| + 1e-4) at the last layer, within [0, 1e4], without gradient.

    Norms in float32. Where the reconstruction's gradient is not finite the weight is 0, so that it cannot
    spread through the adversarial term. Source: Esser et al. 2021, eq. 7.
    """
    wanted = torch.autograd.grad(nll, last_layer, retain_graph=True)[0].to(torch.float32).norm()
    given = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].to(torch.float32).norm()
    ratio = wanted / (given + 1e-4)
    return torch.nan_to_num(ratio, nan=0.0).clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Lets gradients pass through the module to its input, but not to its weights."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
