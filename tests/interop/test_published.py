"""The published models at their full size, without memory: what their files' names and shapes say is what they are."""

from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from ldm.config.compose import CONFIGS, register_resolvers
from ldm.interop import diffusers_config, recognise
from ldm.interop.names import first_stage_as_compvis, first_stage_to_compvis, first_stage_to_diffusers
from ldm.interop.package import Architecture, Text, made, require_fitting, shapes_of_first_stage, shapes_of_network
from ldm.interop.single_file import (
    SCORE,
    SD_SCHEDULE,
    SIZES,
    TARGET,
    _modern,
    _recognised,
    _Told,
    _whole,
)
from ldm.networks.unet import UNet

FIRST_STAGES = ["kl_f4", "kl_f8", "kl_f16", "kl_f32", "vq_f4", "vq_f4_noattn", "vq_f8", "vq_f8_n256", "vq_f16"]
CLIP_L = dict(
    hidden_size=768, layers=12, heads=12, intermediate=3072, vocab=49408, max_position=77, act="quick_gelu",
    bos=49406, eos=49407, pad=49407,
)  # fmt: skip
VIT_H = CLIP_L | dict(hidden_size=1024, layers=23, heads=16, intermediate=4096, act="gelu")
BIG_G = CLIP_L | dict(hidden_size=1280, layers=32, heads=20, intermediate=5120, act="gelu")
LAST: dict[str, Any] = dict(layer=-2, final_norm=False)
FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": dict(texts=(Text(CLIP_L),)),
    "sd1_inpainting": dict(texts=(Text(CLIP_L),), masked=True),
    "sd2": dict(texts=(Text(VIT_H),), prediction="V", size=(768, 768)),
    "sdxl": dict(
        texts=(
            Text(CLIP_L, **LAST, zero_empty_embedding=True),
            Text(BIG_G, 1280, **LAST, pooled=True, zero_empty_embedding=True),
        ),
        numbers=(*SIZES, TARGET),
        size=(1024, 1024),
    ),
    "sdxl_refiner": dict(
        texts=(Text(BIG_G, 1280, **LAST, pooled=True),), numbers=(*SIZES, SCORE), size=(1024, 1024)
    ),
}  # fmt: skip


def shipped(group: str, name: str) -> dict[str, Any]:
    """A shipped configuration's values, beside the first stage and the conditioner of SD 1."""

    def node(group: str, name: str) -> DictConfig:
        own = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
        assert isinstance(own, DictConfig)
        for base in own.pop("defaults", []):
            own = OmegaConf.merge(node(group, base), own)  # type: ignore[assignment]
        return own

    register_resolvers()
    parts = {"first_stage": "kl_f8", "conditioner": "clip_l", group: name}
    whole = OmegaConf.create({part: node(part, chosen) for part, chosen in parts.items()})
    values: dict[str, Any] = OmegaConf.to_container(whole[group], resolve=True)  # type: ignore[assignment]
    return values


def first_stage(name: str) -> dict[str, Any]:
    values = shipped("first_stage", name)
    book = values["regularizer"]
    parts = {part: {k: v for k, v in values[part].items() if k != "_target_"} for part in ("encoder", "decoder")}
    return {
        **parts,
        "codebook": {"entries": book["entries"], "channels": book["channels"]} if "entries" in book else None,
        "latent_channels": values["latent_channels"],
        "quant_conv": True,
    }


def sizes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_model_is_recognised(family: str) -> None:
    network = {k: v for k, v in shipped("network", family).items() if k in UNet.__init__.__annotations__}
    model = Architecture(first_stage("kl_f8"), network, schedule=SD_SCHEDULE, **FAMILIES[family])
    require_fitting(model, family)
    pieces, shapes = _whole(model)
    file = _modern({piece.theirs: piece.of(shapes) for piece in pieces})
    found, used = _recognised(file, _Told({}, {}), family, None, [])
    assert used.keys() == file.keys()
    assert sizes(_whole(found)[1]) == sizes(shapes)
    assert (found.texts, found.numbers, found.masked) == (model.texts, model.numbers, model.masked)
    assert (found.prediction, found.size, found.schedule) == (model.prediction, model.size, model.schedule)
    for name in ("num_heads", "head_channels", "use_linear_projection", "context_dim", "vector_dim"):
        assert (found.network or {}).get(name) == network.get(name), name
    with torch.device("meta"):
        config = diffusers_config.unet_config(model, UNet(**network), 64)
    back = Architecture(model.first_stage, diffusers_config.network_arguments(config, family))
    assert sizes(shapes_of_network(back)) == sizes(shapes_of_network(model))
    assert ((back.network or {})["num_heads"], (back.network or {})["head_channels"]) == (
        network.get("num_heads"), network.get("head_channels"),
    )  # fmt: skip


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_a_published_first_stage_is_recognised(name: str) -> None:
    model = Architecture(first_stage(name))
    shapes = shapes_of_first_stage(model)
    compvis = made(shapes, first_stage_to_compvis(shapes))
    theirs = made(shapes, first_stage_to_diffusers(shapes))
    names = first_stage_as_compvis(theirs)
    renamed = {names[key]: tensor for key, tensor in theirs.items()}
    assert renamed.keys() == compvis.keys()
    for file in (compvis, renamed):
        found = Architecture(recognise.first_stage_arguments(file, name))
        assert sizes(shapes_of_first_stage(found)) == sizes(shapes)
        assert found.first_stage["codebook"] == model.first_stage["codebook"]
    config = diffusers_config.first_stage_config(model, {}, 256)
    back = Architecture(diffusers_config.first_stage_arguments(config, name))
    assert sizes(shapes_of_first_stage(back)) == sizes(shapes)
