"""What a published architecture has beyond its number of parameters: heads, where attention stands, norms, scales."""

from typing import Any

import pytest
import torch
from torch import nn

from ldm.config.build import build
from ldm.config.compose import CONFIGS
from ldm.networks.attention import PixelAttention, SpatialTransformer
from ldm.networks.blocks import Downsample, ResBlock
from ldm.networks.unet import Block, UNet
from tests.configs.nodes import node

# As the YAML files beside the published weights say (CompVis' latent-diffusion and stable-diffusion, Stability's
# generative-models): attention at these downsampling factors; a number of heads, or channels per head (`head`).
SD1 = dict(width=320, mult=(1, 2, 4, 4), at=(4, 2, 1), heads=8, depth=1, context=768)
SD2 = dict(width=320, mult=(1, 2, 4, 4), at=(4, 2, 1), head=64, depth=1, context=1024, linear=True)
UNETS: dict[str, dict[str, Any]] = {
    "sd1": SD1,
    "sd1_inpainting": SD1,
    "sd2": SD2,
    "sdxl": SD2 | dict(mult=(1, 2, 4), at=(4, 2), depth=(1, 2, 10), context=2048, vector=2816),
    "sdxl_refiner": SD2 | dict(width=384, at=(4, 2), depth=4, context=1280, vector=2560),
    "ldm_text_to_image": SD1 | dict(context=1280),
    "ldm_imagenet_f4": dict(width=192, mult=(1, 2, 3, 5), at=(8, 4, 2), heads=1, depth=1, context=512),
    "ldm_imagenet_f8": dict(width=256, mult=(1, 2, 4), at=(4, 2, 1), head=32, depth=1, context=512),
    "ldm_unconditional_f4": dict(width=224, mult=(1, 2, 3, 4), at=(8, 4, 2), head=32),
    "ldm_churches_f8": dict(
        width=192, mult=(1, 2, 2, 4, 4), at=(1, 2, 4, 8), heads=8, use_scale_shift_norm=True, resblock_updown=True
    ),
    "ldm_super_resolution": dict(width=160, mult=(1, 2, 2, 4), at=(16, 8), head=32),
    "ldm_inpainting": dict(width=256, mult=(1, 2, 3, 4), at=(8, 4, 2), heads=8, resblock_updown=True),
}


def check_attention(block: Block, channels: int, facts: dict[str, Any], depth: int) -> None:
    heads = facts["heads"] if "heads" in facts else channels // facts["head"]
    attention = block.attention
    if "depth" not in facts:
        assert isinstance(attention, PixelAttention) and attention.heads == heads
        return
    assert isinstance(attention, SpatialTransformer) and len(attention.blocks) == depth
    assert attention.linear == facts.get("linear", False)
    for inner in attention.blocks:
        assert inner.self_attention.heads == inner.cross_attention.heads == heads
        assert inner.cross_attention.to_k.in_features == facts["context"]


def check_norms(unet: UNet) -> None:
    for module in unet.modules():
        if isinstance(module, ResBlock):
            assert module.norm_1.eps == module.norm_2.eps == 1e-5
        elif isinstance(module, SpatialTransformer):
            assert module.norm.eps == 1e-6
        elif isinstance(module, PixelAttention | nn.LayerNorm):
            assert (module if isinstance(module, nn.LayerNorm) else module.norm).eps == 1e-5
        elif isinstance(module, nn.GroupNorm):
            assert module.num_groups == 32
    assert unet.norm_out.eps == 1e-5


@pytest.mark.parametrize("name", UNETS)
def test_unets_have_their_heads_where_they_were_published(name: str) -> None:
    facts = UNETS[name]
    with torch.device("meta"):
        unet: UNet = build(node("network", name))
    levels = len(facts["mult"])
    depths = facts.get("depth", 0)
    depths = depths if isinstance(depths, tuple) else (depths,) * levels
    for i, mult in enumerate(facts["mult"]):
        down, up = unet.down[i], unet.up[levels - 1 - i]
        assert (len(down.blocks), len(up.blocks)) == (2, 3)
        for block in (*down.blocks, *up.blocks):
            assert block.res.conv_2.out_channels == facts["width"] * mult
            assert block.res.use_scale_shift_norm == facts.get("use_scale_shift_norm", False)
            if 2**i in facts["at"]:
                check_attention(block, facts["width"] * mult, facts, depths[i])
            else:
                assert block.attention is None
        assert (down.downsample is None) == (i == levels - 1) and (up.upsample is None) == (i == 0)
        for resample in (down.downsample, up.upsample):
            assert resample is None or isinstance(resample, ResBlock) == facts.get("resblock_updown", False)
    check_attention(unet.middle[0], facts["width"] * facts["mult"][-1], facts, depths[-1])
    assert unet.middle[1].attention is None
    assert unet.vector_dim == facts.get("vector")
    check_norms(unet)


def test_every_published_network_is_looked_at() -> None:
    assert set(UNETS) == {path.stem for path in (CONFIGS / "network").glob("*.yaml")} - {"small"}


F4, F8, F16, F32 = (1, 2, 4), (1, 2, 4, 4), (1, 1, 2, 2, 4), (1, 1, 2, 2, 4, 4)
VQ8 = (1, 2, 2, 4)
FIRST_STAGES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int | None, float]] = {
    # levels, resolutions with attention (of a picture of 256), latent channels, entries, the scale factor
    "kl_f4": (F4, (), 3, None, 1.0),
    "kl_f8": (F8, (), 4, None, 0.18215),
    "kl_f8_sdxl": (F8, (), 4, None, 0.13025),
    "kl_f16": (F16, (16,), 16, None, 1.0),
    "kl_f32": (F32, (16, 8), 64, None, 1.0),
    "vq_f4": (F4, (), 3, 8192, 1.0),
    "vq_f4_noattn": (F4, (), 3, 8192, 1.0),
    "vq_f8": (VQ8, (32,), 4, 16384, 1.0),
    "vq_f8_n256": (VQ8, (32,), 4, 256, 1.0),
    "vq_f16": (F16, (16,), 8, 16384, 1.0),
}


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stages_are_as_they_were_published(name: str) -> None:
    mult, attention, channels, entries, scale = FIRST_STAGES[name]
    cfg = node("first_stage", name)
    with torch.device("meta"):
        first_stage = build(cfg)
    encoder, decoder = first_stage.encoder, first_stage.decoder
    for i, factor in enumerate(mult):
        for level, blocks in ((encoder.down[i], 2), (decoder.up[len(mult) - 1 - i], 3)):
            res = [part for part in level if isinstance(part, ResBlock)]
            attended = [part for part in level if isinstance(part, PixelAttention)]
            assert len(res) == blocks and all(part.conv_2.out_channels == 128 * factor for part in res)
            assert len(attended) == (blocks if 256 // 2**i in attention else 0)
    for middle in (encoder.middle, decoder.middle):
        assert sum(isinstance(part, PixelAttention) for part in middle) == (name != "vq_f4_noattn")
    assert {m.eps for m in first_stage.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}
    assert {m.num_groups for m in first_stage.modules() if isinstance(m, nn.GroupNorm)} == {32}
    assert {m.heads for m in first_stage.modules() if isinstance(m, PixelAttention)} <= {1}
    assert all(m.asymmetric for m in first_stage.modules() if isinstance(m, Downsample))
    z = channels if entries else 2 * channels  # double_z
    assert (encoder.out_channels, first_stage.quant_conv.out_channels) == (z, z)
    assert first_stage.post_quant_conv.weight.shape == (channels, channels, 1, 1)
    assert (1 / cfg.latent_std, cfg.latent_mean) == (pytest.approx(scale), 0.0)
    if entries:
        regularizer = first_stage.regularizer
        assert regularizer.codebook.weight.shape == (entries, channels)
        assert (regularizer.commitment_weight, regularizer.codebook_weight) == (1.0, 0.25)  # `legacy` and beta


TEXTS: dict[str, list[tuple[int, bool, bool, bool, bool, str | None]]] = {
    # layer, final norm, pooled, projected, zeros where empty, padding
    "clip_l": [(-1, True, False, False, False, None)],
    "openclip_h": [(-1, True, False, False, False, "!")],  # of 23 layers: the last but one of 24
    "sdxl": [(-2, False, False, False, True, None), (-2, False, True, True, True, "!")],
    "sdxl_text": [(-2, False, False, False, True, None), (-2, False, True, True, True, "!")],
    "sdxl_refiner": [(-2, False, True, True, False, "!")],
}
NUMBERS = {
    "sdxl": [("original_size", [1024, 1024]), ("crop", [0, 0]), ("target_size", [1024, 1024])],
    "sdxl_refiner": [("original_size", [1024, 1024]), ("crop", [0, 0]), ("aesthetic_score", [6.0])],
}


@pytest.mark.parametrize("name", TEXTS)
def test_conditioners_are_as_they_were_published(name: str) -> None:
    cfg = node("conditioner", name)
    parts = list(cfg.get("conditioners", [cfg]))
    texts = [part for part in parts if "encoder" in part]
    assert [part for part in parts if "encoder" not in part] == parts[len(texts) :]  # the pooled text comes first
    assert [
        (
            part.get("layer", -1),
            part.get("final_norm", True),
            part.get("pooled", False),
            "projection" in part,
            part.get("zero_empty_embedding", False),
            part.tokenizer.get("pad_token"),
        )
        for part in texts
    ] == TEXTS[name]
    assert cfg.get("encoder", {}).get("clip_skip", 0) == (name == "openclip_h")
    assert all(part.get("max_length") == 77 and part.frozen for part in texts)
    numbers = [(part.field, list(part.default)) for part in parts[len(texts) :]]
    assert numbers == NUMBERS.get(name, [])
    if name == "sdxl_refiner":
        assert list(parts[-1].empty) == [2.5]
