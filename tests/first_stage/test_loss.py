"""The first stage's loss: sums, the adaptive weight's closed form, hinge, gradients to whom they belong."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.criterion import L2
from ldm.errors import UserError
from ldm.first_stage.autoencoder import Reconstruction
from ldm.first_stage.loss import FirstStageLoss, adaptive_weight
from ldm.first_stage.perceptual import PerceptualDistance
from ldm.first_stage.regularizer import KLRegularizer, RegularizerOutput, VQRegularizer
from ldm.networks.discriminator import PatchDiscriminator


class Scale(nn.Module):
    """A decoder of one weight, and a discriminator of one weight: the product of the image and it."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.weight


class Distance(nn.Module):
    """A perceptual distance of 0.25 whatever the images."""

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return images.new_full((len(images),), 0.25)


def reconstruct(images: Tensor, decoder: Scale, regularizer: float = 0.0) -> Reconstruction:
    z = decoder(torch.ones_like(images))
    return Reconstruction(z, RegularizerOutput(z, torch.tensor(regularizer), {}))


def first_stage(decoder: Scale, regularizer: nn.Module | None = None) -> Any:
    """The parts of a first stage that its loss uses."""
    return SimpleNamespace(last_layer=decoder.weight, regularizer=regularizer or KLRegularizer())


def build(**arguments: Any) -> FirstStageLoss:
    return FirstStageLoss(**arguments)


IMAGES = torch.zeros(2, 3, 4, 4)


def test_losses_are_summed_over_values_and_divided_by_the_batch() -> None:
    decoder = Scale(0.5)
    perceptual: Any = Distance()
    assert isinstance(perceptual, nn.Module) and not isinstance(perceptual, PerceptualDistance)
    loss = build(perceptual=perceptual, perceptual_weight=2.0)
    value, logs = loss.generator(IMAGES, reconstruct(IMAGES, decoder, 0.3), 0, first_stage(decoder))
    assert float(value.detach()) == pytest.approx(48 * (0.5 + 2.0 * 0.25) + 0.3)
    assert float(logs["pixel"]) == 0.5 and float(logs["perceptual"]) == 0.25
    squared, _ = build(pixel=L2()).generator(IMAGES, reconstruct(IMAGES, decoder), 0, first_stage(decoder))
    assert float(squared.detach()) == pytest.approx(48 * 0.25)


@pytest.mark.parametrize(
    ("reduction", "regularizer", "expected"),
    [
        (None, KLRegularizer(), 48 * 0.5),
        (None, VQRegularizer(4, 2), 0.5),
        ("mean", KLRegularizer(), 0.5),
        ("sum", VQRegularizer(4, 2), 48 * 0.5),
    ],
)
def test_the_reduction_is_the_regularizers_where_none_is_given(
    reduction: Any, regularizer: nn.Module, expected: float
) -> None:
    decoder = Scale(0.5)
    loss, stage = build(reduction=reduction), first_stage(decoder, regularizer)
    value, _ = loss.generator(IMAGES, reconstruct(IMAGES, decoder, 0.3), 0, stage)
    assert float(value.detach()) == pytest.approx(expected + 0.3)
    with pytest.raises(UserError, match="reduction=sums"):
        build(reduction="sums")


def test_the_adaptive_weight_is_the_ratio_of_the_gradients() -> None:
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    nll, adversarial = (w**2).sum(), 0.5 * w.sum()  # gradients (6, 8) and (0.5, 0.5)
    expected = 10.0 / (0.5 * 2**0.5 + 1e-4)
    assert float(adaptive_weight(nll, adversarial, w)) == pytest.approx(expected)
    assert float(adaptive_weight(nll, 0.0 * w.sum(), w)) == 1e4  # 10 / 1e-4 is above the limit
    assert float(adaptive_weight(nll * float("nan"), adversarial, w)) == 0.0


def test_the_adversarial_term_starts_at_its_step() -> None:
    decoder, discriminator = Scale(0.5), Scale(-2.0)
    loss = build(discriminator=discriminator, discriminator_start_steps=7, discriminator_weight=0.5)
    assert [loss.adversarial_at(step) for step in (0, 6, 7, 8)] == [False, False, True, True]
    before, _ = loss.generator(IMAGES, reconstruct(IMAGES, decoder), 6, first_stage(decoder))
    after, logs = loss.generator(IMAGES, reconstruct(IMAGES, decoder), 7, first_stage(decoder))
    # the decoder's weight w: nll 48 w, adversarial 2 w, so the weight is 0.5 * 48 / (2 + 1e-4)
    weight = 0.5 * 48 / (2 + 1e-4)
    assert float(logs["adversarial_weight"]) == pytest.approx(weight)
    assert float(after.detach()) == pytest.approx(float(before.detach()) + weight * 1.0)
    with pytest.raises(UserError, match="step 6 has no discriminator loss"):
        loss.discriminator_loss(IMAGES, IMAGES, 6)
    assert not build().adversarial_at(10**9)


def test_each_player_trains_its_own_weights() -> None:
    decoder, discriminator = Scale(0.5), Scale(-2.0)
    loss = build(discriminator=discriminator, discriminator_start_steps=0)
    value, _ = loss.generator(IMAGES, reconstruct(IMAGES, decoder), 0, first_stage(decoder))
    value.backward()
    assert decoder.weight.grad is not None and discriminator.weight.grad is None
    assert discriminator.weight.requires_grad
    decoder.weight.grad = None
    fake = reconstruct(IMAGES, decoder).images
    loss.discriminator_loss(IMAGES, fake, 0)[0].backward()
    assert decoder.weight.grad is None and discriminator.weight.grad is not None


def test_the_discriminators_loss_is_the_hinge() -> None:
    loss = build(discriminator=Scale(1.0), discriminator_start_steps=0)
    real, fake = torch.full((1, 1, 1, 2), 0.25), torch.full((1, 1, 1, 2), -3.0)
    value, logs = loss.discriminator_loss(real, fake, 0)
    assert float(value.detach()) == pytest.approx(0.5 * (0.75 + 0.0))
    assert float(logs["discriminator_real"]) == 0.25 and float(logs["discriminator_fake"]) == -3.0
    value, _ = loss.discriminator_loss(fake, real, 0)
    assert float(value.detach()) == pytest.approx(0.5 * (4.0 + 1.25))


def test_bfloat16_reconstructions_give_a_finite_float32_loss() -> None:
    torch.manual_seed(0)
    last = nn.Conv2d(4, 3, 3, padding=1).bfloat16()
    images = torch.rand(2, 3, 32, 32)
    made = last(torch.randn(2, 4, 32, 32).bfloat16())
    reconstruction = Reconstruction(made, RegularizerOutput(made, torch.zeros(()), {}))
    discriminator = PatchDiscriminator(channels=4).bfloat16()
    loss = build(discriminator=discriminator, discriminator_start_steps=0)
    value, logs = loss.generator(images, reconstruction, 0, first_stage(last))
    assert value.dtype == torch.float32 and value.isfinite()
    assert logs["adversarial_weight"].dtype == torch.float32
    value.backward()
    assert last.weight.grad is not None and last.weight.grad.isfinite().all()
