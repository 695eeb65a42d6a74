"""Attention as it is laid out for the CPU: the formula's outputs and gradients, and where keys are padded."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ldm.networks import cpu
from ldm.networks.cpu import scaled_dot_product_attention


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("pixels", "keys"), [(5, 7), (256, 7), (256, 16), (1024, 1024), (1024, 77)])
def test_outputs_and_gradients_are_the_formulas(pixels: int, keys: int, masked: bool) -> None:
    """For few pixels and many, keys that fill the vectors and keys that do not, with a mask and without."""
    random = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, n, 3, 4, dtype=torch.float64, generator=random).requires_grad_() for n in (pixels, keys, keys)
    ]
    mask = torch.rand(2, 1, 1, keys, generator=random) < 0.7 if masked else None
    weight = torch.randn(2, 3, pixels, 4, dtype=torch.float64, generator=random)
    found, wanted = (
        [out, *torch.autograd.grad((out * weight).sum(), tensors)]
        for out in (way(*(x.transpose(1, 2) for x in tensors), mask) for way in (scaled_dot_product_attention, plain))
    )
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() < 1e-12 * b.norm()


@pytest.mark.parametrize(("pixels", "keys", "padded"), [(255, 77, 77), (256, 77, 80), (256, 80, 80), (1024, 1, 16)])
def test_keys_fill_the_vectors_where_there_are_enough_pixels(
    pixels: int, keys: int, padded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, torchs = [], functional.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        seen.append(k.shape[-2])
        return torchs(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(cpu.F, "scaled_dot_product_attention", counted)
    x = torch.randn(1, 2, 1024, 4)
    scaled_dot_product_attention(x[:, :, :pixels], x[:, :, :keys], x[:, :, :keys])
    assert seen == [padded]


def test_arguments_are_not_changed() -> None:
    """Neither the keys nor the mask are written to."""
    x, mask = torch.randn(1, 2, 256, 4), torch.ones(1, 1, 1, 7, dtype=torch.bool)
    before = x.clone()
    scaled_dot_product_attention(x, x[:, :, :7], x[:, :, :7], mask)
    assert x.equal(before) and mask.shape == (1, 1, 1, 7) and mask.all()
