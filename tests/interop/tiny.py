"""Models of the published families with few parameters and random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import captions_tokenizer
from ldm.interop.own_folder import tokenizer_files
from ldm.interop.package import (
    Architecture,
    Package,
    Text,
    shapes_of_first_stage,
    shapes_of_network,
    shapes_of_text,
)
from ldm.interop.single_file import SD_FACTOR, SD_SCHEDULE, SDXL_FACTOR

CAPTIONS = ["a red circle above a blue square", "a blue circle", "a red square"]
SIDE = 32  # pixels


def tokenizer(folder: Path) -> dict[str, str]:
    captions_tokenizer(CAPTIONS * 3, folder)
    return tokenizer_files(folder)


def first_stage(codebook: dict[str, int] | None = None, channels: int = 4) -> dict[str, Any]:
    shared = dict(channels=32, channel_mult=[1, 2], num_res_blocks=1, mid_attention=True, groups=32)
    shared["attention_levels"] = [False, False]
    features = channels if codebook else 2 * channels
    return {
        "encoder": shared | {"in_channels": 3, "out_channels": features},
        "decoder": shared | {"in_channels": channels, "out_channels": 3},
        "codebook": codebook,
        "latent_channels": channels,
        "quant_conv": True,
    }


def network(width: int, context: int, **more: Any) -> dict[str, Any]:
    linear = more.get("use_linear_projection", False)
    return {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": width,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_levels": [True, True],
        "num_heads": None if linear else 8,
        "head_channels": 64 if linear else None,
        "context_dim": context,
        "transformer_depth": 1,
        "use_linear_projection": linear,
        "vector_dim": None,
        "groups": 32,
    } | more


def text(vocab: int, act: str, width: int = 64, **taken: Any) -> Text:
    config = dict(
        hidden_size=width, layers=2, heads=width // 64, intermediate=96, vocab=vocab, max_position=77, act=act
    )
    return Text({**config, "bos": vocab - 2, "eos": vocab - 1, "pad": vocab - 1}, **taken)


def numbers(*last: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    sizes = [{"field": "original_size", "default": [SIDE, SIDE]}, {"field": "crop", "default": [0, 0]}]
    return (*sizes, *last)


def architecture(family: str, vocab: int) -> Architecture:
    taken: dict[str, Any] = dict(layer=-2, final_norm=False)
    size, linear = (SIDE, SIDE), dict(use_linear_projection=True)
    if family == "sd1":
        return Architecture(
            first_stage(), network(32, 64), (text(vocab, "quick_gelu"),), (), SD_SCHEDULE, "Epsilon", size
        )
    if family == "inpainting":
        unet = network(32, 64, in_channels=9)
        return Architecture(first_stage(), unet, (text(vocab, "quick_gelu"),), (), SD_SCHEDULE, "Epsilon", size, True)
    if family == "sd2":
        return Architecture(
            first_stage(), network(64, 64, **linear), (text(vocab, "gelu"),), (), SD_SCHEDULE, "V", size
        )
    if family == "sdxl":
        unet = network(64, 64 + 128, **linear, attention_levels=[False, True], vector_dim=48 + 6 * 256)
        unet |= {"transformer_depth": [1, 2]}
        first = text(vocab, "quick_gelu", **taken, zero_empty_embedding=True)
        second = text(vocab, "gelu", 128, projection_dim=48, pooled=True, **taken, zero_empty_embedding=True)
        target = {"field": "target_size", "default": [SIDE, SIDE]}
        return Architecture(first_stage(), unet, (first, second), numbers(target), SD_SCHEDULE, "Epsilon", size)
    unet = network(64, 64, **linear, attention_levels=[True, False], transformer_depth=2, vector_dim=48 + 5 * 256)
    one = text(vocab, "gelu", projection_dim=48, pooled=True, **taken)
    score = {"field": "aesthetic_score", "default": [6.0], "empty": [2.5]}
    return Architecture(first_stage(), unet, (one,), numbers(score), SD_SCHEDULE, "Epsilon", size)


def weights(shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random weights under which activations neither vanish nor grow."""
    found = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape.shape)
        if shape.ndim > 1:
            found[name] = noise * (0.1 if "embedding" in name else shape[0].numel() ** -0.5)
        else:
            found[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
    return found


def package(family: str, folder: Path, statistics: Callable[[int], tuple[Tensor, Tensor]] | None = None) -> Package:
    """A model of a family, with the family's scale factor unless other latent statistics are given."""
    torch.manual_seed(0)
    files = tokenizer(folder / f"{family}_tokenizer")
    vocab = len(captions_tokenizer([], folder / f"{family}_tokenizer"))
    known = architecture(family, vocab)
    state = {f"denoiser.network.{n}": t for n, t in weights(shapes_of_network(known)).items()}
    for i, part in enumerate(known.texts):
        state |= {known.text_prefix(i) + n: t for n, t in weights(shapes_of_text(part)).items()}
    state |= {f"first_stage.{n}": t for n, t in weights(shapes_of_first_stage(known)).items()}
    factor = SDXL_FACTOR if known.numbers else SD_FACTOR
    mean, std = statistics(4) if statistics else (torch.zeros(4), torch.full((4,), 1.0 / factor))
    state |= {"first_stage.latent_mean": mean, "first_stage.latent_std": std}
    return Package(known, state, [files] * len(known.texts))


def same(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal names, types, shapes and bits."""
    assert given.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert given[name].dtype == tensor.dtype and torch.equal(given[name], tensor), name
