"""The PatchGAN: its logits' shape, its initialisation."""

import torch
from torch import nn

from ldm.networks.discriminator import PatchDiscriminator


def test_one_logit_per_patch() -> None:
    assert PatchDiscriminator(channels=8)(torch.randn(2, 3, 64, 48)).shape == (2, 1, 6, 4)


def test_a_logit_sees_seventy_pixels() -> None:
    discriminator = PatchDiscriminator(channels=4).eval()
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    discriminator(images)[0, 0, 7, 7].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_initialisation() -> None:
    torch.manual_seed(0)
    for module in PatchDiscriminator().modules():
        if isinstance(module, nn.Conv2d):
            assert abs(float(module.weight.detach().std()) - 0.02) < 0.002
        if isinstance(module, nn.BatchNorm2d):
            assert abs(float(module.weight.detach().mean()) - 1.0) < 0.01
