"""The perceptual distance: closed form, its gradient, LPIPS' weights."""

import math

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.first_stage.perceptual import PerceptualDistance, lpips_weights
from ldm.networks.frozen import FrozenNetwork
from ldm.networks.vgg import FEATURE_CHANNELS


class Pixels(FrozenNetwork):
    """A network whose two feature maps are the image and its negative."""

    def features(self, x: Tensor) -> list[Tensor]:
        return [x, -x]


def colour(*channels: float) -> Tensor:
    return torch.tensor(channels).view(1, 3, 1, 1).expand(1, 3, 4, 4)


def test_two_directions_have_the_distance_of_their_angle() -> None:
    # unit vectors at angle a differ by 2 - 2 cos(a); here a is 90 degrees, then 45
    distance = PerceptualDistance(Pixels(), weights=[1.0, 0.0])
    images = torch.cat([colour(0.0, 3.0, 0.0), colour(2.0, 2.0, 0.0)])
    target = torch.cat([colour(0.5, 0.0, 0.0), colour(0.5, 0.0, 0.0)])
    torch.testing.assert_close(distance(images, target), torch.tensor([2.0, 2.0 - math.sqrt(2.0)]))
    torch.testing.assert_close(PerceptualDistance(Pixels())(images, target)[0], torch.tensor(4.0))


def test_weights_per_channel() -> None:
    distance = PerceptualDistance(Pixels(), weights=[torch.tensor([1.0, 0.5, 7.0]), 0.0])
    torch.testing.assert_close(distance(colour(0.0, 1.0, 0.0), colour(1.0, 0.0, 0.0)), torch.tensor([1.0 + 0.5]))


def test_the_gradient_reaches_the_reconstruction_and_is_finite_where_features_vanish() -> None:
    images = torch.rand(2, 3, 4, 4)
    images[:, :, 0, 0] = 0.0
    images.requires_grad_()
    PerceptualDistance(Pixels())(images, torch.rand(2, 3, 4, 4)).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.abs().max() > 0


def test_equal_images_have_distance_zero() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert PerceptualDistance(Pixels())(images, images).tolist() == [0.0, 0.0]


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="1 perceptual weights for a network of 2 stages"):
        PerceptualDistance(Pixels(), weights=[1.0])(colour(0, 0, 0), colour(0, 0, 0))
    with pytest.raises(UserError, match="stage 1 is below 0"):
        PerceptualDistance(Pixels(), weights=[1.0, -1.0])


def test_lpips_weights_fit_vgg() -> None:
    pytest.importorskip("torchmetrics")
    weights = lpips_weights()
    assert tuple(len(weight) for weight in weights) == FEATURE_CHANNELS
    assert all((weight >= 0).all() for weight in weights)
