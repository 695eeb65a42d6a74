"""Numbers as Fourier features."""

import pytest
import torch

from ldm.conditioning import MicroConditioner
from ldm.errors import UserError
from ldm.networks.blocks import sinusoidal_embedding


def test_each_number_has_its_embedding_side_by_side() -> None:
    conditioner = MicroConditioner("crop", [0, 0], channels=8)
    vector = conditioner({"crop": torch.tensor([[3, 5], [0, 7]])}).vector
    assert vector is not None and vector.shape == (2, 16)
    wanted = sinusoidal_embedding(torch.tensor([3.0, 5.0]), 8).flatten()
    torch.testing.assert_close(vector[0], wanted)


def test_texts_defaults_and_the_empty_condition() -> None:
    conditioner = MicroConditioner("aesthetic_score", [6.0], empty=[2.5], channels=8)
    six, low = sinusoidal_embedding(torch.tensor([6.0, 2.5]), 8)
    given = conditioner({"caption": ["a", "b"], "aesthetic_score": ["6", ""]}).vector
    assert given is not None
    torch.testing.assert_close(given, torch.stack([six, low]))
    missing = conditioner({"caption": ["a", "b"]}).vector
    assert missing is not None
    torch.testing.assert_close(missing, torch.stack([six, six]))


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="crop has 3 numbers; expected 2"):
        MicroConditioner("crop", [0, 0])({"crop": ["1 2 3"]})
    with pytest.raises(UserError, match="expected 2 numbers"):
        MicroConditioner("crop", [0, 0])({"crop": ["left top"]})
    with pytest.raises(UserError, match=r"default=\[0, 0\], empty=\[1\]"):
        MicroConditioner("crop", [0, 0], empty=[1])
