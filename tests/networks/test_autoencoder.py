"""Encoder and decoder: factors, attention per level."""

from typing import Any

import pytest
import torch

from ldm.networks.attention import PixelAttention
from ldm.networks.autoencoder import Decoder, Encoder


def test_factor_and_shapes() -> None:
    encoder = Encoder(3, 8, (1, 2, 2), 1, out_channels=6, groups=4)
    decoder = Decoder(3, 8, (1, 2, 2), 1, groups=4)
    assert encoder.factor == decoder.factor == 4
    h = encoder(torch.randn(2, 3, 16, 24))
    assert h.shape == (2, 6, 4, 6)
    assert decoder(h[:, :3]).shape == (2, 3, 16, 24)


@pytest.mark.parametrize(("levels", "mid", "expected"), [(None, True, 1), (None, False, 0), ((0, 1), True, 3)])
def test_attention_stands_where_it_is_asked_for(levels: Any, mid: bool, expected: int) -> None:
    encoder = Encoder(3, 8, (1, 2), 2, 4, mid_attention=mid, attention_levels=levels, groups=4)
    assert sum(isinstance(m, PixelAttention) for m in encoder.modules()) == expected
