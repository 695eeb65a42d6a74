"""Our UNet against diffusers' of the same architecture and weights: outputs and the gradients of every parameter."""

from typing import Any

import pytest
import torch

from ldm.interop.names import unet_to_diffusers
from ldm.networks.unet import UNet

from .names import copy_weights, gradients_of, relative, share_weights, spread, worst_gradient

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5  # ||difference|| / ||value||, float32
Case = tuple[dict[str, Any], dict[str, Any]]

SD1: Case = (
    dict(channel_mult=(1, 2, 4, 4), attention_levels=(True, True, True, False), num_heads=8, context_dim=24),
    dict(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=8,  # diffusers means the number of heads
        cross_attention_dim=24,
    ),
)
INPAINTING: Case = (SD1[0] | dict(in_channels=9), SD1[1] | dict(in_channels=9))
SD2: Case = (
    SD1[0] | dict(num_heads=None, head_channels=16, use_linear_projection=True),
    SD1[1] | dict(attention_head_dim=(2, 4, 8, 8), use_linear_projection=True),
)
SDXL: Case = (
    dict(
        channel_mult=(1, 2, 4),
        attention_levels=(False, True, True),
        transformer_depth=(1, 2, 3),
        head_channels=16,
        use_linear_projection=True,
        context_dim=24,
        vector_dim=20 + 6 * 8,
    ),
    dict(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    ),
)
REFINER: Case = (
    dict(
        channel_mult=(1, 2, 4, 4),
        attention_levels=(False, True, True, False),
        transformer_depth=2,
        head_channels=16,
        use_linear_projection=True,
        context_dim=24,
        vector_dim=20 + 5 * 8,
    ),
    dict(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8, 8),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 5 * 8,
    ),
)
# With a channel per group, the biases before the norms would have gradients of rounding errors alone: 8 groups.
CONDITIONAL: dict[str, Case] = {
    name: (ours | dict(groups=8), peers | dict(norm_num_groups=8))
    for name, (ours, peers) in dict(sd1=SD1, inpainting=INPAINTING, sd2=SD2, sdxl=SDXL, refiner=REFINER).items()
}


def compare(ours: dict[str, Any], peers: dict[str, Any], size: tuple[int, int] = (16, 24)) -> dict[str, float]:
    """The relative differences of the output, of the latents' gradient and of the worst parameter's gradient."""
    torch.manual_seed(0)
    unet = UNet(**({"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 2} | ours))
    spread(unet)
    with torch.device("meta"):
        peer = diffusers.UNet2DConditionModel(**peers)
    pieces = unet_to_diffusers(dict(unet.named_parameters()))
    share_weights(unet, peer, pieces)

    latents, t = torch.randn(2, 4, *size), torch.tensor([7.0, 800.0])
    tokens = torch.randn(2, 5, unet.context_dim or 1)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    concat = torch.randn(2, unet.in_channels - 4, *size) if unet.in_channels > 4 else None
    a, b = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    vector, added = None, None
    if unet.vector_dim is not None:
        text, numbers = torch.randn(2, 20), torch.tensor([[64.0, 48, 0, 3, 64, 64], [32.0, 32, 5, 0, 96, 64]])
        numbers = numbers[:, : (unet.vector_dim - 20) // 8]
        added = {"text_embeds": text, "time_ids": numbers}
        features = peer.add_time_proj(numbers.flatten()).reshape(2, -1)
        vector = torch.cat([text, features], dim=1)
    out = unet(a, t, tokens, mask, vector=vector, concat=concat)
    given = b if concat is None else torch.cat([b, concat], dim=1)
    wanted = peer(given, t, tokens, encoder_attention_mask=mask, added_cond_kwargs=added).sample
    reached = {"output": relative(out, wanted)}
    target = torch.randn_like(out)
    (out - target).square().mean().backward()
    (wanted - target).square().mean().backward()
    assert a.grad is not None and b.grad is not None
    reached["latents"] = relative(a.grad, b.grad)
    worst, name = worst_gradient(unet, gradients_of(peer, unet, pieces))
    reached[name] = worst
    assert all(value < TOLERANCE for value in reached.values()), reached
    return reached


@pytest.mark.parametrize("name", CONDITIONAL)
def test_outputs_and_gradients_are_those_of_diffusers(name: str) -> None:
    compare(*CONDITIONAL[name])


@pytest.mark.slow  # full width: 860M parameters, 3 copies of them in float32 (weights, and two gradients)
def test_sd1_at_full_width() -> None:
    ours, peers = SD1
    full = dict(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
    # 2 x 2 pixels at the lowest level: over a single one, attention's weights have no gradient but rounding errors.
    compare(ours | dict(model_channels=320, context_dim=768), peers | full, size=(16, 16))


@pytest.mark.parametrize("resblock_updown", [False, True], ids=["convolutions", "blocks"])
def test_unconditional_unets_are_those_of_diffusers(resblock_updown: bool) -> None:
    """Plain attention in the transformers' place; with `blocks` also scale and shift, as LSUN churches has it."""
    torch.manual_seed(0)
    unet = UNet(
        3, 3, 32, (1, 2, 4), 2, (False, True, True), head_channels=16, transformer_depth=0,
        use_scale_shift_norm=resblock_updown, resblock_updown=resblock_updown, groups=8,
    )  # fmt: skip
    spread(unet)
    peer = diffusers.UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D" if resblock_updown else "DownBlock2D",) + ("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D" if resblock_updown else "UpBlock2D",),
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift" if resblock_updown else "default",
        downsample_type="resnet" if resblock_updown else "conv",
        upsample_type="resnet" if resblock_updown else "conv",
        norm_eps=1e-5,
        norm_num_groups=8,  # with a channel per group the bias before a norm would have a gradient of exactly 0
        attn_norm_num_groups=8,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
    )
    pieces = unet_to_diffusers(dict(unet.named_parameters()))
    copy_weights(unet, peer, pieces)
    x, t = torch.randn(2, 3, 16, 24), torch.tensor([7.0, 800.0])
    out, wanted = unet(x, t), peer(x, t).sample
    assert relative(out, wanted) < TOLERANCE
    target = torch.randn_like(out)
    (out - target).square().mean().backward()
    (wanted - target).square().mean().backward()
    worst, name = worst_gradient(unet, gradients_of(peer, unet, pieces), left_out="attention.to_k.bias")
    assert worst < TOLERANCE, (name, worst)
