"""Classes, small pictures and pictures with a hole as conditions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning import ClassConditioner, LowResolution, MaskedImage
from ldm.errors import UserError


class Average:
    """A first stage whose latents are a picture's means over factor x factor pixels."""

    def __init__(self, factor: int, channels: int) -> None:
        self.factor, self.channels = factor, channels

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return F.avg_pool2d(images, self.factor)[:, : self.channels]


IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_classes_by_number_and_by_name() -> None:
    conditioner = ClassConditioner(3, 4, names=["cat", "dog", "owl"])
    tokens = conditioner({"caption": ["dog", "1", ""]}).tokens
    assert tokens is not None and tokens.shape == (3, 1, 4)
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[2, 0], conditioner.embedding.weight[3])
    with pytest.raises(UserError, match=r"'owls' is not a class: .*did you mean owl"):
        conditioner({"caption": ["owls"]})
    with pytest.raises(UserError, match="'3' is not a class: give a number from 0 to 2"):
        ClassConditioner(3, 4)({"caption": ["3"]})


@pytest.mark.parametrize("factor", [4, 8])
def test_a_small_picture_has_the_latents_size_and_the_mean_of_its_pixels(factor: int) -> None:
    conditioner, first_stage = LowResolution(), Average(factor, 2)
    with pytest.raises(UserError, match="LowResolution needs a first stage"):
        conditioner({"image": IMAGES})
    conditioner.bind(first_stage)
    concat = conditioner({"image": IMAGES}).concat
    assert concat is not None and concat.shape[2:] == first_stage.encode(IMAGES).shape[2:]
    torch.testing.assert_close(concat[0, 0, 0, 0], IMAGES[0, 0, :factor, :factor].mean())
    with pytest.raises(UserError, match="needs the field 'image'"):
        conditioner({"caption": ["a"]})


def test_a_hole_is_hidden_and_told() -> None:
    conditioner = MaskedImage()
    with pytest.raises(UserError, match="MaskedImage needs a first stage"):
        conditioner({"image": IMAGES})
    conditioner.bind(Average(4, 2))
    mask = torch.zeros(3, 1, 16, 16)
    mask[:, :, :8] = 1.0
    first = conditioner({"image": IMAGES, "mask": mask}).concat
    other = conditioner({"image": torch.where(mask == 1, 0.3, IMAGES), "mask": mask}).concat
    assert first is not None and other is not None and first.shape == (3, 3, 4, 4)
    torch.testing.assert_close(first, other)  # what is under the mask is not seen
    assert first[:, 0, :2].min() == 1.0 and first[:, 0, 2:].max() == 0.0
    last = MaskedImage(mask_first=False)
    last.bind(Average(4, 2))
    turned = last({"image": IMAGES, "mask": mask}).concat
    assert turned is not None
    torch.testing.assert_close(turned[:, [2, 0, 1]], first)


def test_masks_in_training_are_rectangles_that_depend_on_their_key_alone() -> None:
    conditioner = MaskedImage(whole=0.25)
    conditioner.bind(Average(1, 1))
    images, keys = torch.zeros(400, 3, 16, 24), torch.arange(400)
    concat = conditioner({"image": images}, keys).concat
    again = conditioner({"image": images[:2]}, keys[7:9]).concat
    assert concat is not None and again is not None
    masks = concat[:, :1]
    torch.testing.assert_close(masks[7:9], again[:, :1])
    rows, columns = masks.amax(3).sum((1, 2)), masks.amax(2).sum((1, 2))
    assert torch.equal(masks.sum((1, 2, 3)), rows * columns)  # a rectangle
    assert bool((rows >= 3).all() and (columns >= 5).all())  # of a quarter at least
    assert 0.15 < float((masks.mean((1, 2, 3)) == 1).float().mean()) < 0.35
    whole = conditioner({"image": IMAGES}).concat
    assert whole is not None and whole[:, 0].min() == 1.0
