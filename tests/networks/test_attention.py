"""Attention: against the formula, masks, and the head count."""

import math

import pytest
import torch

from ldm.errors import UserError
from ldm.networks.attention import Attention, PixelAttention, SpatialTransformer, head_count


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_attention_is_softmax_of_the_scaled_products() -> None:
    attention = Attention(8, heads=2, context_dim=6)
    x, context = torch.randn(1, 5, 8), torch.randn(1, 3, 6)
    q, k, v = attention.to_q(x)[0], attention.to_k(context)[0], attention.to_v(context)[0]
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(4), dim=-1)
        heads.append(weights @ v[:, part])
    torch.testing.assert_close(attention(x, context)[0], attention.to_out(torch.cat(heads, dim=-1)))


def test_masked_tokens_do_not_matter() -> None:
    transformer = SpatialTransformer(8, heads=2, context_dim=6, groups=4)
    x, tokens = torch.randn(2, 8, 3, 4), torch.randn(2, 5, 6)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])[:, None, None, :]
    other = tokens.clone()
    other[0, 3:] += 1.0
    torch.testing.assert_close(transformer(x, tokens, mask), transformer(x, other, mask))
    assert not torch.allclose(transformer(x, tokens), transformer(x, other))


def test_a_transformer_without_context_attends_to_itself_only() -> None:
    transformer = SpatialTransformer(8, heads=2, groups=4)
    assert not [name for name, _ in transformer.named_parameters() if "cross" in name]
    assert transformer(torch.randn(2, 8, 3, 4)).shape == (2, 8, 3, 4)


@pytest.mark.parametrize("linear", [False, True])
def test_projections_are_the_same_map_in_both_shapes(linear: bool) -> None:
    conv = SpatialTransformer(8, heads=2, context_dim=6, groups=4)
    other = SpatialTransformer(8, heads=2, context_dim=6, groups=4, use_linear_projection=linear)
    shapes = other.state_dict()
    other.load_state_dict({k: v.reshape(shapes[k].shape) for k, v in conv.state_dict().items()})
    x, tokens = torch.randn(2, 8, 3, 4), torch.randn(2, 5, 6)
    torch.testing.assert_close(conv(x, tokens), other(x, tokens))


def test_channels_last_gives_the_same() -> None:
    x = torch.randn(2, 8, 3, 4)
    attention = PixelAttention(8, groups=4)
    out = attention(x)
    torch.testing.assert_close(out, attention(x.contiguous(memory_format=torch.channels_last)))


def test_head_count() -> None:
    assert head_count(320, num_heads=8, head_channels=None) == 8
    assert head_count(320, num_heads=None, head_channels=64) == 5
    for heads, width in ((8, 64), (None, None), (7, None), (None, 48), (None, 640)):
        with pytest.raises(UserError):
            head_count(320, num_heads=heads, head_channels=width)
