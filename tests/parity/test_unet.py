"""Our UNet against diffusers' UNet2DConditionModel with the same weights: outputs and gradients."""

from typing import Any

import pytest
import torch

from ldm.networks.unet import UNet

from .names import UNET, copy_weights, relative

diffusers = pytest.importorskip("diffusers")

SD1: tuple[dict[str, Any], dict[str, Any]] = (
    dict(channel_mult=(1, 2, 4, 4), attention_levels=(True, True, True, False), num_heads=8),
    dict(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=8,  # diffusers means the number of heads
    ),
)
SDXL: tuple[dict[str, Any], dict[str, Any]] = (
    dict(
        channel_mult=(1, 2, 4),
        attention_levels=(False, True, True),
        transformer_depth=(1, 2, 3),
        head_channels=16,
        linear_projections=True,
        vector_dim=20,
    ),
    dict(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        class_embed_type="projection",  # the vector as it is; SDXL makes it of pooled text and sizes
        projection_class_embeddings_input_dim=20,
    ),
)


@pytest.mark.parametrize(("ours", "peers"), [SD1, SDXL], ids=["sd1", "sdxl"])
def test_outputs_and_gradients_are_those_of_diffusers(ours: dict[str, Any], peers: dict[str, Any]) -> None:
    torch.manual_seed(0)
    unet = UNet(4, 4, 32, num_res_blocks=2, context_dim=24, **ours)
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    peer = diffusers.UNet2DConditionModel(cross_attention_dim=24, **peers)
    vector = "vector_dim" in ours
    rules = [(a, b.replace("add_embedding", "class_embedding")) for a, b in UNET]
    names = copy_weights(unet, peer, rules if vector else UNET)

    x, t, tokens = torch.randn(2, 4, 16, 24), torch.tensor([7.0, 800.0]), torch.randn(2, 5, 24)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    labels = torch.randn(2, 20) if vector else None
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = unet(a, t, tokens, mask, vector=labels)
    wanted = peer(b, t, tokens, encoder_attention_mask=mask, class_labels=labels).sample
    assert relative(out, wanted) < 1e-5

    target = torch.randn_like(out)
    (out - target).square().mean().backward()
    (wanted - target).square().mean().backward()
    assert a.grad is not None and b.grad is not None
    assert relative(a.grad, b.grad) < 1e-5
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None
        assert relative(parameter.grad, gradients[names[name]]) < 2e-5, name
