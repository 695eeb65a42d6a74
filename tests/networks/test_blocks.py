"""The blocks: the time embedding's closed form, group norms of narrow widths, sizes of resampling."""

import math

import pytest
import torch

from ldm.errors import UserError
from ldm.networks.blocks import Downsample, ResBlock, Upsample, group_norm, per_level, sinusoidal_embedding


def test_time_embedding_is_cosines_then_sines() -> None:
    t = torch.tensor([0.0, 17.5, 999.0])
    embedding = sinusoidal_embedding(t, 8)
    for row, time in zip(embedding, t.tolist(), strict=True):
        angles = [time * 10_000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row.tolist() == pytest.approx(expected, abs=1e-4)


def test_time_embedding_stays_float32_for_half_precision_times() -> None:
    assert sinusoidal_embedding(torch.tensor([500], dtype=torch.int64), 7).shape == (1, 7)
    assert sinusoidal_embedding(torch.tensor([500.0], dtype=torch.bfloat16), 8).dtype == torch.float32


@pytest.mark.parametrize(("channels", "groups"), [(320, 32), (48, 16), (96, 32), (36, 4), (33, 1)])
def test_group_norm_takes_groups_that_divide(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def test_per_level_repeats_a_number_and_refuses_a_wrong_length() -> None:
    assert per_level(2, 3, "n") == (2, 2, 2)
    assert per_level([1, 2], 2, "n") == (1, 2)
    with pytest.raises(UserError, match=r"num_res_blocks=\[1, 2\] has 2 entries; channel_mult has 3"):
        per_level([1, 2], 3, "num_res_blocks")


def test_resampling_sizes() -> None:
    x = torch.randn(1, 4, 9, 6)
    assert Downsample(4)(x).shape == (1, 4, 5, 3)
    assert Downsample(4, asymmetric=True)(x).shape == (1, 4, 4, 3)
    assert Upsample(4)(x).shape == (1, 4, 18, 12)
    assert Upsample(4)(x, size=(17, 12)).shape == (1, 4, 17, 12)


def test_scale_shift_of_zero_is_the_block_without_embedding() -> None:
    torch.manual_seed(0)
    block = ResBlock(8, 8, emb_channels=4, use_scale_shift_norm=True, groups=4)
    x = torch.randn(2, 8, 5, 5)
    assert block.emb is not None
    torch.nn.init.zeros_(block.emb.bias)
    torch.testing.assert_close(block(x, torch.zeros(2, 4)), block(x, None))
    assert not torch.allclose(block(x, torch.ones(2, 4)), block(x, None))
