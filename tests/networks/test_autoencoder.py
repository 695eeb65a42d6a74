"""Encoder and decoder: published parameter counts, factors, attention per level."""

from typing import Any

import pytest
import torch
from torch import nn

from ldm.networks.attention import PixelAttention
from ldm.networks.autoencoder import Decoder, Encoder


def count(mult: tuple[int, ...], z: int, attention: tuple[bool, ...] | None = None) -> int:
    """Parameters of a KL first stage of the LDM paper, with its two 1x1 convolutions."""
    with torch.device("meta"):
        arguments: dict[str, Any] = dict(attention_levels=attention)
        parts = (
            Encoder(3, 128, mult, 2, 2 * z, **arguments),
            Decoder(z, 128, mult, 2, **arguments),
            nn.Conv2d(2 * z, 2 * z, 1),
            nn.Conv2d(z, z, 1),
        )
    return sum(p.numel() for part in parts for p in part.parameters())


def test_published_parameter_counts() -> None:
    assert count((1, 2, 4), 3) == 55_312_063  # KL-f4
    assert count((1, 2, 4, 4), 4) == 83_653_863  # KL-f8
    assert count((1, 1, 2, 2, 4), 16, (False,) * 4 + (True,)) == 69_610_963  # KL-f16
    assert count((1, 1, 2, 2, 4, 4), 64, (False,) * 4 + (True, True)) == 103_880_131  # KL-f32


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
