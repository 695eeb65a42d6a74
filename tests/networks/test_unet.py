"""The UNet: its start at zero, conditions, sizes and checkpointing."""

from typing import Any

import pytest
import torch

from ldm.errors import UserError
from ldm.networks.unet import UNet


def tiny(**changes: Any) -> UNet:
    """A UNet of two levels whose output is not zero."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = dict(
        in_channels=4,
        out_channels=4,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(False, True),
        head_channels=8,
        context_dim=12,
        groups=8,
    )
    unet = UNet(**(arguments | changes))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def test_a_fresh_unet_predicts_zero() -> None:
    unet = UNet(4, 4, 16, (1, 2), 1, (True, True), num_heads=2, context_dim=12, groups=8)
    out = unet(torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 12))
    assert out.abs().max() == 0
    assert all((b.res.conv_2.weight == 0).all() for level in unet.down for b in level.blocks)


def test_branches_begin_at_random_where_asked() -> None:
    unet = UNet(4, 4, 16, (1, 2), 1, (True, True), num_heads=2, context_dim=12, groups=8, zero_init_residual=False)
    assert unet(torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 5, 12)).abs().max() == 0
    blocks = [block for level in (*unet.down, *unet.up) for block in level.blocks]
    assert all(block.res.conv_2.weight.std() > 0 and block.attention.proj_out.weight.std() > 0 for block in blocks)


@pytest.mark.parametrize("resblock_updown", [False, True], ids=["convolutions", "blocks"])
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (20, 36), (33, 17), (1, 3)])
def test_any_size_comes_back(size: tuple[int, int], resblock_updown: bool) -> None:
    levels = dict(channel_mult=(1, 1, 2, 2), attention_levels=(False, True, False, True))
    unet = tiny(**levels, resblock_updown=resblock_updown)
    out = unet(torch.randn(1, 4, *size), torch.zeros(1), torch.randn(1, 3, 12))
    assert out.shape == (1, 4, *size) and out.isfinite().all()


def test_a_size_without_pixels_is_refused() -> None:
    tiny().check_size(1, 1)
    for size in ((0, 8), (8, 0)):
        with pytest.raises(UserError, match=f"latents of {size[0]} x {size[1]}"):
            tiny().check_size(*size)


def inputs_of(unet: UNet) -> dict[str, torch.Tensor]:
    """A batch of two that uses every input, of a UNet with in_channels=6 and vector_dim=5; half of it masked."""
    torch.manual_seed(1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    tokens, vector = torch.randn(2, 3, 12), torch.randn(2, 5)
    z, concat = torch.randn(2, 4, 20, 12), torch.randn(2, 2, 20, 12)
    return dict(z=z, t=torch.tensor([10.0, 500.0]), tokens=tokens, mask=mask, vector=vector, concat=concat)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_weights_and_autocast_are_close(dtype: torch.dtype, tolerance: float) -> None:
    unet = tiny(in_channels=6, vector_dim=5)
    given = inputs_of(unet)
    wanted = unet(**given)
    with torch.autocast("cpu", dtype):
        cast = unet(**given)
    half = {
        name: value.to(dtype) if value.is_floating_point() and name != "t" else value for name, value in given.items()
    }
    out = unet.to(dtype)(**half)
    assert out.dtype == dtype
    for found in (cast, out):
        assert (found.float() - wanted).norm() < tolerance * wanted.norm()


@torch.no_grad()
def test_memory_layout_and_batch_change_nothing() -> None:
    unet = tiny(in_channels=6, vector_dim=5)
    given = inputs_of(unet)
    wanted = unet(**given)
    alone = unet(**{name: value[1:] for name, value in given.items()})
    torch.testing.assert_close(alone, wanted[1:], atol=1e-5, rtol=1e-4)
    last = unet.to(memory_format=torch.channels_last)(**given)
    torch.testing.assert_close(last, wanted, atol=1e-5, rtol=1e-4)


def test_every_input_matters() -> None:
    unet = tiny(in_channels=6, vector_dim=5)
    given = {
        "z": torch.randn(2, 4, 8, 8),
        "t": torch.tensor([10.0, 500.0]),
        "tokens": torch.randn(2, 3, 12),
        "vector": torch.randn(2, 5),
        "concat": torch.randn(2, 2, 8, 8),
    }
    out = unet(**given)
    for name, value in given.items():
        assert not torch.allclose(out, unet(**(given | {name: value + 1.0})), atol=1e-4), name


def test_a_mask_hides_tokens_as_if_they_were_not_there() -> None:
    unet = tiny()
    x, t, tokens = torch.randn(1, 4, 8, 8), torch.zeros(1), torch.randn(1, 5, 12)
    mask = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(unet(x, t, tokens, mask), unet(x, t, tokens[:, :3]))


def test_a_concat_of_another_size_is_refused() -> None:
    unet = tiny(in_channels=6)
    with pytest.raises(UserError, match=r"a concat of \[4, 4\] pixels with latents of \[8, 8\]"):
        unet(torch.randn(1, 4, 8, 8), torch.zeros(1), torch.randn(1, 3, 12), concat=torch.randn(1, 2, 4, 4))


def test_unconditional_and_scale_shift() -> None:
    unet = tiny(context_dim=None, use_scale_shift_norm=True, num_res_blocks=(1, 2))
    assert unet(torch.randn(2, 4, 8, 8), torch.zeros(2)).shape == (2, 4, 8, 8)


def test_checkpointing_changes_neither_output_nor_gradient() -> None:
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), torch.randn(2, 3, 12)
    gradients = []
    for checkpointing in (False, True):
        unet = tiny(gradient_checkpointing=checkpointing)
        unet(*inputs).square().mean().backward()
        gradients.append([p.grad for p in unet.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_condition_of_another_width_is_refused() -> None:
    unet = tiny()
    x, t = torch.randn(1, 4, 8, 8), torch.zeros(1)
    with pytest.raises(UserError, match="tokens of shape None; this UNet was built for a width of 12"):
        unet(x, t)
    with pytest.raises(UserError, match=r"tokens of shape \[1, 3, 768\]"):
        unet(x, t, torch.randn(1, 3, 768))
    with pytest.raises(UserError, match="vector of shape"):
        unet(x, t, torch.randn(1, 3, 12), vector=torch.randn(1, 5))
