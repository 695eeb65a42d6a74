"""The published models at their full size, without memory: what their files' names and shapes say is what they are."""

from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from ldm.conditioning.image import MaskedImage
from ldm.config.compose import CONFIGS
from ldm.config.run_folder import register_resolvers
from ldm.diffusion.prediction import Epsilon, V
from ldm.interop import diffusers_config, nodes, recognise
from ldm.interop.names import first_stage_as_compvis, first_stage_to_compvis, first_stage_to_diffusers
from ldm.interop.nodes import Node, text_conditioner
from ldm.interop.package import to_layout
from ldm.interop.recognise import micro_conditioners
from ldm.interop.single_file import SD_SCHEDULE, Hints, layout, modern, recognised

from .tiny import description

FIRST_STAGES = ["kl_f4", "kl_f8", "kl_f16", "kl_f32", "vq_f4", "vq_f4_noattn", "vq_f8", "vq_f8_n256", "vq_f16"]
CLIP_L = dict(
    hidden_size=768, layers=12, heads=12, intermediate=3072, vocab=49408, max_position=77, act="quick_gelu",
    bos=49406, eos=49407, pad=49407,
)  # fmt: skip
VIT_H = CLIP_L | dict(hidden_size=1024, layers=23, heads=16, intermediate=4096, act="gelu")
BIG_G = CLIP_L | dict(hidden_size=1280, layers=32, heads=20, intermediate=5120, act="gelu")
LAST: dict[str, Any] = dict(layer=-2, final_norm=False)
SDXL_CLIP = text_conditioner(CLIP_L, **LAST, zero_empty_embedding=True)
SDXL_BIG_G = text_conditioner(BIG_G, 1280, **LAST, pooled=True, zero_empty_embedding=True)
REFINER_TEXT = text_conditioner(BIG_G, 1280, **LAST, pooled=True)
FAMILIES: dict[str, tuple[list[Node], Node, list[int]]] = {  # conditioners, prediction, size
    "sd1": ([text_conditioner(CLIP_L)], nodes.node(Epsilon), [512, 512]),
    "sd1_inpainting": ([text_conditioner(CLIP_L), nodes.node(MaskedImage)], nodes.node(Epsilon), [512, 512]),
    "sd2": ([text_conditioner(VIT_H)], nodes.node(V), [768, 768]),
    "sdxl": ([SDXL_CLIP, SDXL_BIG_G, *micro_conditioners("target_size")], nodes.node(Epsilon), [1024, 1024]),
    "sdxl_refiner": ([REFINER_TEXT, *micro_conditioners("aesthetic_score")], nodes.node(Epsilon), [1024, 1024]),
}


SD1_WIDTHS = {"in_channels": 4, "out_channels": 4, "context_dim": 768, "vector_dim": None}


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
    return {name: SD1_WIDTHS[name] if value == "auto" else value for name, value in values.items()}


def sizes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_model_is_recognised(family: str) -> None:
    conditioners, prediction, size = FAMILIES[family]
    network = shipped("network", family)
    first_stage = shipped("first_stage", "kl_f8")
    model = nodes.latent_diffusion(network, nodes.conditioner(conditioners), SD_SCHEDULE, prediction, first_stage)
    nodes.require_fitting(model, family)
    mappings, shapes = layout(model)
    file = modern({mapping.theirs: mapping.of(shapes) for mapping in mappings})
    found, used = recognised(file, Hints(family, {}, {}), None)
    assert used.keys() == file.keys()
    assert sizes(layout(found.model)[1]) == sizes(shapes)
    assert description(found.model["conditioner"]) == description(model["conditioner"])
    assert (found.model["denoiser"]["prediction"], found.config["data"]["size"]) == (prediction, size)
    assert found.model["denoiser"]["schedule"] == SD_SCHEDULE
    given = nodes.arguments(network)
    for name in ("num_heads", "head_channels", "use_linear_projection", "context_dim", "vector_dim"):
        assert nodes.arguments(found.model["denoiser"]["network"])[name] == given[name], name
    back = diffusers_config.unet_node(diffusers_config.unet_config(model, 64), family)
    assert sizes(nodes.shapes(back)) == sizes(nodes.shapes(network))
    assert (back["num_heads"], back["head_channels"]) == (given["num_heads"], given["head_channels"])


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_a_published_first_stage_is_recognised(name: str) -> None:
    model = shipped("first_stage", name)
    shapes = nodes.shapes(model)
    compvis = to_layout(shapes, first_stage_to_compvis(shapes))
    theirs = to_layout(shapes, first_stage_to_diffusers(shapes))
    names = first_stage_as_compvis(theirs)
    renamed = {names[key]: tensor for key, tensor in theirs.items()}
    assert renamed.keys() == compvis.keys()
    book = {key: model["regularizer"].get(key) for key in ("entries", "channels")}
    for file in (compvis, renamed):
        found = recognise.first_stage_node(file, name)
        assert sizes(nodes.shapes(found)) == sizes(shapes)
        assert {key: found["regularizer"].get(key) for key in book} == book
    back = diffusers_config.first_stage_node(diffusers_config.first_stage_config(model, {}, 256), name)
    assert sizes(nodes.shapes(back)) == sizes(shapes)
