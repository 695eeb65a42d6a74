"""Our ControlNet against diffusers' with the same weights: what it adds, and what the UNet makes of it."""

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.interop.names import unet_to_diffusers
from ldm.networks.controlnet import ControlNet
from ldm.networks.unet import UNet

from .names import TOLERANCE, OurSinusoids, copy_weights, gradients_of, relative, spread, worst_gradient
from .test_unet import CONDITIONAL

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("float64")


def hint_names(net: ControlNet) -> dict[str, str]:
    """diffusers' names of the parameters that a UNet does not have, by ours."""
    found = {"hint.0": "controlnet_cond_embedding.conv_in"}
    last = len(net.hint) - 1
    found |= {f"hint.{i}": f"controlnet_cond_embedding.blocks.{i - 1}" for i in range(1, last)}
    found[f"hint.{last}"] = "controlnet_cond_embedding.conv_out"
    middle = len(net.out) - 1
    found |= {f"out.{i}": f"controlnet_down_blocks.{i}" for i in range(middle)}
    found[f"out.{middle}"] = "controlnet_mid_block"
    return {f"{ours}.{p}": f"{theirs}.{p}" for ours, theirs in found.items() for p in ("weight", "bias")}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_what_it_adds_the_controlled_prediction_and_gradients_are_those_of_diffusers(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs = CONDITIONAL[name]
    unet = UNet(4, 4, 32, num_res_blocks=2, **ours)
    spread(unet)
    net = ControlNet(unet)
    spread(net)
    pieces = unet_to_diffusers(dict(unet.named_parameters()))
    peer_unet = diffusers.UNet2DConditionModel(**theirs)
    copy_weights(unet, peer_unet, pieces)
    down = {name: value for name, value in theirs.items() if not name.startswith("up_")}
    peer = diffusers.ControlNetModel(**down, conditioning_embedding_out_channels=(16, 32, 96, 256))
    own = {name: p.detach() for name, p in net.named_parameters()}
    trunk = {name: p.detach() for name, p in unet.named_parameters()} | {
        name.removeprefix("trunk."): p for name, p in own.items() if name.startswith("trunk.")
    }
    state: dict[str, Tensor] = {piece.theirs: piece.of(trunk) for piece in pieces}
    state |= {name: own[mine] for mine, name in hint_names(net).items()}
    peer.load_state_dict({name: state[name] for name in peer.state_dict()}, strict=True)
    peer.time_proj = peer_unet.time_proj = OurSinusoids(unet.model_channels)

    x, t = torch.randn(2, 4, 16, 24), torch.tensor([7.0, 800.0])
    tokens, hint = torch.randn(2, 5, 24), torch.rand(2, 3, 128, 192)
    vector, added = None, None
    if unet.vector_dim is not None:
        text, numbers = torch.randn(2, 20), torch.tensor([[64.0, 48, 0, 3, 64, 64], [32.0, 32, 5, 0, 96, 64]])
        added = {"text_embeds": text, "time_ids": numbers}
        vector = torch.cat([text, peer.add_time_proj(numbers.flatten()).reshape(2, -1)], dim=1)
    found = net(x, t, hint, tokens, vector=vector)
    blocks, middle = peer(x, t, tokens, hint, added_cond_kwargs=added, return_dict=False)
    assert len(found) == len(blocks) + 1
    for mine, wanted in zip(found, [*blocks, middle], strict=True):
        assert relative(mine, wanted) < TOLERANCE
    out = unet(x, t, tokens, vector=vector, control=found)
    wanted = peer_unet(
        x, t, tokens, added_cond_kwargs=added,
        down_block_additional_residuals=blocks, mid_block_additional_residual=middle,
    ).sample  # fmt: skip
    assert relative(out, wanted) < TOLERANCE
    assert relative(unet(x, t, tokens, vector=vector), wanted) > 0.1

    target = torch.randn_like(out)
    (out - target).square().mean().backward()
    (wanted - target).square().mean().backward()
    there = dict(peer.named_parameters())
    gradients = gradients_of(peer, net.trunk, [piece for piece in pieces if piece.theirs in there])
    gradients = {f"trunk.{name}": g for name, g in gradients.items()}
    for mine, name in hint_names(net).items():
        gradients[mine] = peer.get_parameter(name).grad
    worst, name = worst_gradient(net, gradients)
    assert worst < TOLERANCE, (name, worst)


def test_it_begins_without_a_say() -> None:
    torch.manual_seed(0)
    unet = UNet(4, 4, 16, (1, 2), 1, (True, False), num_heads=2, context_dim=6, groups=4)
    spread(unet)
    net = ControlNet(unet)
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([7.0, 800.0]), torch.randn(2, 5, 6)
    added = net(x, t, torch.rand(2, 3, 64, 64), tokens)
    assert [tuple(part.shape[1:]) for part in added] == [(16, 8, 8)] * 2 + [(16, 4, 4)] + [(32, 4, 4)] * 2
    assert not any(part.any() for part in added)
    assert torch.equal(unet(x, t, tokens, control=added), unet(x, t, tokens))
    with pytest.raises(UserError, match=r"hint of shape \[2, 3, 32, 32\] .* expected \[2, 3, 64, 64\]"):
        net(x, t, torch.rand(2, 3, 32, 32), tokens)
    assert "trunk.up.0.blocks.0.res.conv_1.weight" not in net.state_dict()
