"""How attention is computed: the formula's outputs and gradients in every way, and which way is chosen where."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ldm.networks import attend as choice
from ldm.networks.attend import attend
from tests.networks.test_chunked_attention import plain


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("pixels", "keys"), [(5, 7), (256, 7), (256, 16), (1024, 1024), (1024, 77)])
def test_outputs_and_gradients_are_the_formulas(pixels: int, keys: int, masked: bool) -> None:
    """For few pixels and many, keys that fill the vectors and keys that do not, with a mask and without."""
    random = torch.Generator().manual_seed(0)
    given = [
        torch.randn(2, n, 3, 4, dtype=torch.float64, generator=random).requires_grad_() for n in (pixels, keys, keys)
    ]
    mask = torch.rand(2, 1, 1, keys, generator=random) < 0.7 if masked else None
    weight = torch.randn(2, 3, pixels, 4, dtype=torch.float64, generator=random)
    found, wanted = (
        [out, *torch.autograd.grad((out * weight).sum(), given)]
        for out in (way(*(x.transpose(1, 2) for x in given), mask) for way in (attend, plain))
    )
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() < 1e-12 * b.norm()


@pytest.mark.parametrize(("pixels", "keys", "padded"), [(255, 77, 77), (256, 77, 80), (256, 80, 80), (1024, 1, 16)])
def test_keys_fill_the_vectors_where_there_are_pixels_enough(
    pixels: int, keys: int, padded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def torchs(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        seen.append(k.shape[-2])
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(choice.F, "scaled_dot_product_attention", torchs)
    x = torch.randn(1, 2, 1024, 4)
    attend(x[:, :, :pixels], x[:, :, :keys], x[:, :, :keys])
    assert seen == [padded]


def test_what_is_given_stays_as_it_is() -> None:
    """Neither the keys nor the mask are written to."""
    x, mask = torch.randn(1, 2, 256, 4), torch.ones(1, 1, 1, 7, dtype=torch.bool)
    before = x.clone()
    attend(x, x[:, :, :7], x[:, :, :7], mask)
    assert x.equal(before) and mask.shape == (1, 1, 1, 7) and mask.all()


@pytest.mark.parametrize(
    ("dtype", "width", "units", "chunked"),
    [
        (torch.bfloat16, 8, True, True),
        (torch.bfloat16, 64, True, False),
        (torch.float32, 8, True, False),
        (torch.bfloat16, 8, False, False),
    ],
)
def test_it_is_chosen_where_it_is_faster(
    dtype: torch.dtype, width: int, units: bool, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(choice, "MATRIX_UNITS", units)
    monkeypatch.setattr(choice, "chunked_attention", lambda q, k, v, mask: called.append(1) or q)
    x = torch.randn(1, 2, 128, width, dtype=dtype)
    attend(x, x, x)
    attend(x[:, :, :4], x[:, :, :4], x[:, :, :4])  # too small to matter
    assert len(called) == chunked
