"""Models of the published families with few parameters and random weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import captions_tokenizer
from ldm.conditioning.image import MaskedImage
from ldm.diffusion.prediction import Epsilon, Prediction, V
from ldm.interop import nodes
from ldm.interop.nodes import Node
from ldm.interop.package import Package
from ldm.interop.recognise import micro_conditioners
from ldm.interop.single_file import SD_SCHEDULE
from ldm.interop.statistics import SD_FACTOR, SDXL_FACTOR
from ldm.interop.tokenizers import tokenizer_files
from ldm.networks.unet import UNet

CAPTIONS = ["a red circle above a blue square", "a blue circle", "a red square"]
SIDE = 32  # pixels


def tokenizer(folder: Path) -> dict[str, str]:
    captions_tokenizer(CAPTIONS * 3, folder)
    return tokenizer_files(folder)


def first_stage(entries: int | None = None, channels: int = 4, **more: Any) -> Node:
    shared = dict(channels=32, channel_mult=[1, 2], num_res_blocks=1, mid_attention=True, groups=32)
    shared["attention_levels"] = [False, False]
    features = channels if entries else 2 * channels
    encoder = {**shared, "in_channels": 3, "out_channels": features, **more}
    return nodes.first_stage(
        encoder, {**shared, "in_channels": channels, "out_channels": 3, **more}, channels, True, entries
    )


def network(width: int, context: int, **more: Any) -> Node:
    linear = more.get("use_linear_projection", False)
    options = {
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
    }
    return nodes.node(UNet, **(options | more))


def text(vocab: int, act: str, width: int = 64, **options: Any) -> Node:
    config = dict(
        hidden_size=width, layers=2, heads=width // 64, intermediate=96, vocab=vocab, max_position=77, act=act
    )
    return nodes.text_conditioner({**config, "bos": vocab - 2, "eos": vocab - 1, "pad": vocab - 1}, **options)


def model(family: str, vocab: int) -> Node:
    options: dict[str, Any] = dict(layer=-2, final_norm=False)
    linear = dict(use_linear_projection=True)
    prediction: type[Prediction] = Epsilon
    conditioners = [text(vocab, "quick_gelu")]
    if family == "sd1":
        unet = network(32, 64)
    elif family == "inpainting":
        unet = network(32, 64, in_channels=9)
        conditioners.append(nodes.node(MaskedImage, mask_first=True))
    elif family == "sd2":
        unet, prediction = network(64, 64, **linear), V
        conditioners = [text(vocab, "gelu")]
    elif family == "sdxl":
        unet = network(64, 64 + 128, **linear, attention_levels=[False, True], vector_dim=48 + 6 * 256)
        unet |= {"transformer_depth": [1, 2]}
        first = text(vocab, "quick_gelu", **options, zero_empty_embedding=True)
        second = text(vocab, "gelu", 128, projection_dim=48, pooled=True, **options, zero_empty_embedding=True)
        conditioners = [first, second, *micro_conditioners("target_size", (SIDE, SIDE))]
    else:
        unet = network(64, 64, **linear, attention_levels=[True, False], transformer_depth=2, vector_dim=48 + 5 * 256)
        one = text(vocab, "gelu", projection_dim=48, pooled=True, **options)
        conditioners = [one, *micro_conditioners("aesthetic_score", (SIDE, SIDE))]
    conditioner = nodes.conditioner(conditioners)
    return nodes.latent_diffusion(unet, conditioner, SD_SCHEDULE, nodes.node(prediction), first_stage())


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


def state(described: Node) -> dict[str, Tensor]:
    """Random weights of a model's parameters."""
    shapes = nodes.parts(described)
    order = sorted(shapes, key=lambda prefix: (prefix != nodes.NETWORK, prefix.startswith("first_stage"), prefix))
    return {prefix + n: t for prefix in order for n, t in weights(shapes[prefix]).items()}


def package(family: str, folder: Path, statistics: Callable[[int], tuple[Tensor, Tensor]] | None = None) -> Package:
    """A model of a family, with the family's scale factor unless other latent statistics are given."""
    torch.manual_seed(0)
    files = tokenizer(folder / f"{family}_tokenizer")
    described = model(family, len(captions_tokenizer([], folder / f"{family}_tokenizer")))
    own = state(described)
    factor = SDXL_FACTOR if nodes.numbers(described) else SD_FACTOR
    mean, std = statistics(4) if statistics else (torch.zeros(4), torch.full((4,), 1.0 / factor))
    own |= {"first_stage.latent_mean": mean, "first_stage.latent_std": std}
    config = nodes.model_config(described, (SIDE, SIDE))
    return Package(config, own, [files] * len(nodes.texts(described)), str(folder))


def alone(described: Node, **options: Any) -> Package:
    """A first stage with random weights and statistics 0 and 1."""
    torch.manual_seed(0)
    channels = described["latent_channels"]
    own = state(described) | {"latent_mean": torch.zeros(channels), "latent_std": torch.ones(channels)}
    return Package({"model": described}, own, **options)


def with_schedule(given: Package, schedule: Node) -> Package:
    """The same model on another schedule."""
    denoiser = {**given.model["denoiser"], "schedule": schedule}
    return replace(given, config={**given.config, "model": {**given.model, "denoiser": denoiser}})


def description(described: Any) -> Any:
    """A node with the defaults of what it does not give, without the statistics that its weights have as well."""
    if isinstance(described, list | tuple):
        return [description(part) for part in described]
    if not isinstance(described, dict) or "_target_" not in described:
        return described
    values = {name: description(part) for name, part in nodes.arguments(described).items()}
    return {n: v for n, v in values.items() if n not in nodes.STATISTICS} | {"_target_": described["_target_"]}


def same(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal names, types, shapes and bits."""
    assert given.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert given[name].dtype == tensor.dtype and torch.equal(given[name], tensor), name
