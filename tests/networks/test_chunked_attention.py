"""Attention in chunks: outputs and gradients against the plain formula, and memory."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ldm.networks import attend as choice
from ldm.networks import chunked_attention as module
from ldm.networks.chunked_attention import chunked_attention
from ldm.networks.unet import UNet
from tests.parity.names import spread

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
MASK = torch.tensor([[True, True, False, True, False, True, True], [True] * 7])[:, None, None, :]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Room for two of six heads at a time, once for one head and a half."""
    torch.manual_seed(0)
    monkeypatch.setattr(module, "CHUNK_entries", 2 * 5 * 7)
    yield


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q [2, 3, 5, 4], k and v [2, 3, 7, 4], as the projections lay them out."""
    shapes = [(2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4)]
    q, k, v = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v


def results(attention: Attend, given: tuple[Tensor, Tensor, Tensor], mask: Tensor | None) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    q, k, v = (x.transpose(1, 2) for x in given)
    out = attention(q, k, v, mask)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), given)]


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_outputs_and_gradients_are_the_formulas(dtype: torch.dtype, tolerance: float, mask: Tensor | None) -> None:
    """Within the precision's error: bfloat16 has 8 bits, so 2^-9 at each of a few roundings."""
    given = inputs(dtype)
    exact = tuple(x.detach().double().requires_grad_() for x in given)
    wanted = results(plain, exact, mask)  # type: ignore[arg-type]
    for found, value in zip(results(chunked_attention, given, mask), wanted, strict=True):
        assert found.dtype == dtype
        assert (found.double() - value).norm() / value.norm() < tolerance


def test_where_nothing_may_be_attended_to_it_is_torchs() -> None:
    """Zero, and no NaN in the gradients."""
    mask = MASK.clone()
    mask[0] = False
    given = inputs(torch.float64)
    wanted = results(torch.nn.functional.scaled_dot_product_attention, given, mask)
    for found, value in zip(results(chunked_attention, given, mask), wanted, strict=True):
        assert torch.allclose(found, value, rtol=1e-9, atol=1e-12) and value.any()
        assert not found[0].any()


def test_it_is_a_sound_operator() -> None:
    """Schema, fake tensors and autograd, as torch.compile needs them."""
    q, k, v = (x.transpose(1, 2) for x in inputs(torch.float64))
    torch.library.opcheck(module._forward, (q, k, v, MASK))


def test_no_more_weights_exist_than_a_chunk_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    weights = module._weights

    def counted(*given: Tensor) -> Tensor:
        made = weights(*given)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(module, "_weights", counted)
    results(chunked_attention, inputs(torch.float64), None)
    assert sizes == [2 * 5 * 7] * 6  # three chunks forward, the same three again backward


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_of_a_unet_in_bfloat16_are_as_good_as_with_torchs(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast, with chunks and without, against float32: the errors are those of the precision.

    They are of independent roundings: their ratio is 0.97 to 1.06 over eight seeds, with AVX2 and with AVX-512.
    """
    torch.manual_seed(0)
    x, t, tokens = torch.randn(2, 4, 16, 16), torch.tensor([7.0, 800.0]), torch.randn(2, 5, 12)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    unet = UNet(4, 4, 32, (1, 2), 1, (True, True), num_heads=2, context_dim=12, gradient_checkpointing=checkpointing)
    spread(unet)
    found = []
    for precision, units in (("float32", False), ("bf16", False), ("bf16", True)):
        monkeypatch.setattr(choice, "MATRIX_UNITS", units)
        monkeypatch.setattr(choice, "LARGE_entries", 64)
        calls = count_calls(monkeypatch)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = unet(x, t, tokens, mask)
        found.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(out.float().square().mean(), [*unet.parameters()])])
        )
        assert bool(calls) == units
    exact, torchs, ours = found
    error, own = ((g - exact).norm() / exact.norm() for g in (torchs, ours))
    assert 1e-4 < own < 1.25 * error < 0.1


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def counted(*given: Tensor) -> Tensor:
        calls.append(1)
        return chunked_attention(*given)

    monkeypatch.setattr(choice, "chunked_attention", counted)
    return calls
