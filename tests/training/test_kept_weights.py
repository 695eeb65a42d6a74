"""Weights kept in bfloat16: the numbers are autocast's bit for bit, and float32 masters are what everyone sees."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoint import load_tensors
from ldm.networks.unet import UNet
from ldm.training.kept_weights import keep_weights
from tests.training.miniature import train

X, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 700.0])
TOKENS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))


def unet(**more: Any) -> UNet:
    torch.manual_seed(0)
    network = UNet(
        4, 4, 16, (1, 2), 1, (True, True), num_heads=2, context_dim=12, groups=4, zero_init_residual=False, **more
    )
    nn.init.normal_(network.conv_out.weight, std=0.1)
    return network.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]


def steps(network: UNet, n: int = 3) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
    """Output, gradients and weights after each of n steps of fused AdamW, each of two micro-steps."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
    for _ in range(n):
        optimizer.zero_grad()
        for sign in (1.0, -1.0):
            with torch.autocast("cpu", torch.bfloat16):
                out = network(sign * X, T, TOKENS)
            (out.float() - 1.0).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
        gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        yield out.detach(), gradients, [p.detach().clone() for p in network.parameters()]


def as_lightning() -> torch.autocast:
    """Autocast without torch's own cache, which holds within one such block and does not see a step."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_autocasts_bit_for_bit(checkpointing: bool) -> None:
    plain, kept = unet(gradient_checkpointing=checkpointing), unet(gradient_checkpointing=checkpointing)
    assert len(keep_weights(kept)) == 1
    for (out, gradients, weights), (own, own_gradients, own_weights) in zip(steps(plain), steps(kept), strict=True):
        assert own.dtype == torch.bfloat16 and torch.equal(own, out)
        assert len(own_gradients) == len(gradients) == len(weights)
        for ours, theirs in zip(own_gradients + own_weights, gradients + weights, strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_a_copy_is_made_only_where_a_master_has_changed() -> None:
    network = unet()
    (kept,) = keep_weights(network)
    with torch.autocast("cpu", torch.bfloat16):
        network(X, T, TOKENS)
        versions = [copy._version for copy in kept._copies]
        network(X, T, TOKENS)
        assert [copy._version for copy in kept._copies] == versions
        with torch.no_grad():
            network.conv_in.weight.mul_(2.0)
        network(X, T, TOKENS)
    changed = [i for i, copy in enumerate(kept._copies) if copy._version != versions[i]]
    assert [kept._slots[i] for i in changed] == [(network.conv_in, "weight")]


def test_a_step_is_seen_whatever_came_before_it() -> None:
    """Also after a forward pass between the gradients and the fused step, which made copies of the old weights."""
    outs = []
    for network in (unet(), unet()):
        if outs:
            keep_weights(network)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
        with as_lightning():
            network(X, T, TOKENS).float().square().mean().backward()
            before = network(X, T, TOKENS)
            optimizer.step()
            outs.append(network(X, T, TOKENS))
        assert not torch.equal(outs[-1], before)
    assert torch.equal(*outs)


def test_two_passes_may_wait_for_their_gradients() -> None:
    """Nothing is cast between the micro-steps of an accumulation, so what the passes keep stays valid."""
    gradients = []
    for network in (unet(), unet()):
        made = keep_weights(network) if gradients else []
        with as_lightning():
            first, second = (network(sign * X, T, TOKENS).float().square().mean() for sign in (1.0, -1.0))
            versions = [copy._version for kept in made for copy in kept._copies]
            first.backward()
            third = network(0.5 * X, T, TOKENS).float().square().mean()
            (second + third).backward()
            assert [copy._version for kept in made for copy in kept._copies] == versions
        gradients.append([p.grad for p in network.parameters()])
    assert all(g is not None and h is not None and torch.equal(g, h) for g, h in zip(*gradients, strict=True))


def test_the_average_is_seen_that_validation_puts_in() -> None:
    """Lightning validates in inference mode, and the average is copied into the parameters there."""
    plain, kept = unet(), unet()
    keep_weights(kept)
    for network in (plain, kept):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            network(X, T, TOKENS)
            for p in network.parameters():
                p.copy_(p * 1.5)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kept(X, T, TOKENS), plain(X, T, TOKENS))
    for (out, _, _), (own, _, _) in zip(steps(plain, 1), steps(kept, 1), strict=True):
        assert torch.equal(own, out)


def test_the_masters_come_back_after_an_error() -> None:
    network = unet()
    keep_weights(network)
    before = dict(network.named_parameters())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        network(X, T, TOKENS[:, :, :5].repeat(1, 1, 1)[:, :, [0] * 12].double()[:1].repeat(3, 1, 1))
    after = dict(network.named_parameters())
    assert all(after[name] is p for name, p in before.items()) and after.keys() == before.keys()


def test_without_autocast_nothing_happens() -> None:
    plain, kept = unet(), unet()
    (copies,) = keep_weights(kept)
    assert torch.equal(kept(X, T, TOKENS), plain(X, T, TOKENS))
    assert not copies._copies


def test_a_compiled_network_is_left_alone() -> None:
    network = unet()
    network.compile()
    assert not keep_weights(network)


BF16 = ("trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0")


@pytest.mark.slow
def test_a_run_in_bfloat16_is_the_same_and_has_float32_weights(
    tiny_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three stages with first stage, text encoder, average, clipping by a fused optimizer, and checkpoints."""
    kept = train(tiny_shapes, tmp_path / "kept", *BF16)
    monkeypatch.setattr("ldm.config.build.keep_weights", lambda module: [])
    plain = train(tiny_shapes, tmp_path / "plain", *BF16)
    for stage in ("first_stage", "base", "finetune"):
        for file in ("weights.safetensors", "ema.safetensors"):
            found, wanted = (load_tensors(run / stage / "model" / file)[0] for run in (kept, plain))
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (stage, name)
            assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.float32}
