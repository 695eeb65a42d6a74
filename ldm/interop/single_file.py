"""The single file of CompVis and sgm: SD 1, SD 2, SDXL base and refiner, and first stages alone.

What names and shapes do not tell (heads of another width, groups, the prediction, a tokenizer of one's own) is in
the file's metadata under `ldm` where this module wrote it; other tools do not ask for it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import load_tensors, load_torch, save_tensors
from ldm.errors import UserError
from ldm.interop import recognise
from ldm.interop.names import (
    Piece,
    first_stage_to_compvis,
    text_to_open_clip,
    text_to_transformers,
    unet_to_compvis,
)
from ldm.interop.package import (
    Architecture,
    Package,
    Text,
    made,
    shapes_of_first_stage,
    shapes_of_network,
    shapes_of_text,
    taken,
)
from ldm.interop.recognise import FIRST_STAGE, UNET
from ldm.interop.statistics import folded, is_std_of, noted, unfolded

METADATA = "ldm"
SD_FACTOR, SDXL_FACTOR = 0.18215, 0.13025
SD_SCHEDULE = {"kind": "ScaledLinear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}
SIZES = [{"field": name, "default": default} for name, default in (("original_size", [1024, 1024]), ("crop", [0, 0]))]
TARGET = {"field": "target_size", "default": [1024, 1024]}
SCORE = {"field": "aesthetic_score", "default": [6.0], "empty": [2.5]}
# What these files hold beside the weights: schedules, averages' counters, losses, numbers that are computed.
BESIDE = re.compile(
    r"^(betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights|scale_factor|global_step"
    r"|denoiser\.sigmas|model_ema\..*|(first_stage_model\.)?loss\..*|.*\.position_ids|.*logit_scale)$"
)


def places(architecture: Architecture) -> list[str]:
    """Each text encoder's prefix in the file. UserError for a model that this layout has no room for."""
    network, texts = architecture.network or {}, architecture.texts
    numbers = [part["field"] for part in architecture.numbers]
    if not numbers and len(texts) == 1:
        open_clip = bool(network.get("linear_projections"))
        return ["cond_stage_model.model." if open_clip else "cond_stage_model.transformer.text_model."]
    if numbers == ["original_size", "crop", "target_size"] and len(texts) == 2:
        return ["conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."]
    if numbers == ["original_size", "crop", "aesthetic_score"] and len(texts) == 1:
        return ["conditioner.embedders.0.model."]
    raise UserError(
        f"a single file has no place for this model's conditions ({len(texts)} text encoders, {numbers or 'no'} "
        "numbers): it holds SD 1, SD 2, SDXL base or refiner, or a first stage"
    )


def factor_of(architecture: Architecture) -> float:
    """The latent scale factor that readers of these files assume."""
    return SDXL_FACTOR if architecture.numbers else SD_FACTOR


def _text_pieces(text: Text, place: str) -> list[Piece]:
    names = shapes_of_text(text)
    return text_to_open_clip(names) if place.endswith(".model.") else text_to_transformers(names, "")


# ---------------------------------------------------------------------------------------------------- writing


def write_single_file(package: Package, path: Path) -> None:
    """Writes a package as one safetensors file, whole or not at all."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a single file is written as safetensors; give a name that ends in .safetensors")
    architecture = package.architecture
    first_stage = package.part("first_stage.")
    metadata = {"format": "pt"}
    tensors: dict[str, Tensor] = {}
    description: dict[str, Any] = {"architecture": architecture.plain(), "tokenizers": package.tokenizers}
    if architecture.network is None:
        description["latents"] = {name: first_stage[name].tolist() for name in ("latent_mean", "latent_std")}
    else:
        factor = factor_of(architecture)
        if first_stage["latent_mean"].any() or not is_std_of(first_stage["latent_std"], factor):
            metadata |= noted(first_stage)
            first_stage = folded(first_stage, factor)
        tensors |= made(package.part("denoiser.network."), unet_to_compvis(shapes_of_network(architecture)), UNET)
        for i, (text, place) in enumerate(zip(architecture.texts, places(architecture), strict=True)):
            tensors |= made(package.part(architecture.text_prefix(i)), _text_pieces(text, place), place)
    prefix = FIRST_STAGE if architecture.network is not None else ""
    tensors |= made(first_stage, first_stage_to_compvis(shapes_of_first_stage(architecture)), prefix)
    save_tensors(path, tensors, {**metadata, METADATA: json.dumps(description)})


# ---------------------------------------------------------------------------------------------------- reading


def read_single_file(path: Path, weights: str = "ema", prediction: str | None = None) -> Package:
    """The model in a `.safetensors`, `.ckpt` or `.pt` file, recognised by its tensors' names and shapes.

    `weights`: `ema` takes CompVis' averaged UNet where the file has one, `raw` the other. `prediction` is the class's
    name where names and shapes do not tell (SD 2: V, where none is given). UserError for anything else.
    """
    tensors, metadata = _tensors(path)
    recognise.refuse_adapters(list(tensors), str(path))
    if weights == "ema":
        tensors = _averaged(tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if not BESIDE.match(name)}
    description = json.loads(metadata[METADATA]) if METADATA in metadata else {}
    if any(name.startswith(UNET) for name in tensors):
        return _model(tensors, metadata, description, str(path), prediction)
    if any(name.startswith(FIRST_STAGE) for name in tensors):
        tensors = {name.removeprefix(FIRST_STAGE): tensor for name, tensor in tensors.items()}
    if "encoder.conv_in.weight" in tensors and "decoder.conv_in.weight" in tensors:
        return _bare_first_stage(tensors, description, str(path))
    raise UserError(
        f"{path} is no model that is known here: it has neither a UNet ({UNET}*) nor a first stage (encoder.*, "
        f"decoder.*) in CompVis' or sgm's layout; its tensors begin with {', '.join(sorted(tensors)[:3]) or 'nothing'}"
    )


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{" or path.suffix == ".safetensors":  # a header's length in 8 bytes, then JSON
        return load_tensors(path)
    state = load_torch(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no weights by name: expected a state dict, or one under 'state_dict'")
    return state, {}


def _averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with CompVis' averages (`model_ema.*`, names without dots) in the UNet's place."""
    found = dict(tensors)
    for name in tensors:
        average = "model_ema." + name.removeprefix("model.").replace(".", "")
        if name.startswith(UNET) and average in tensors:
            found[name] = tensors[average]
    return found


def _bare_first_stage(tensors: dict[str, Tensor], description: dict[str, Any], origin: str) -> Package:
    if description:
        architecture = Architecture.of(description["architecture"])
    else:
        architecture = Architecture(recognise.first_stage_arguments(tensors, origin))
    shapes = shapes_of_first_stage(architecture)
    state = taken(tensors, first_stage_to_compvis(shapes), shapes, origin)
    channels = architecture.first_stage["latent_channels"]
    known = description.get("latents", {"latent_mean": [0.0] * channels, "latent_std": [1.0] * channels})
    state |= {name: torch.tensor(values) for name, values in known.items()}
    return Package(architecture, {f"first_stage.{name}": tensor for name, tensor in state.items()})


def _model(
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    description: dict[str, Any],
    origin: str,
    prediction: str | None,
) -> Package:
    if description:
        architecture = Architecture.of(description["architecture"])
    else:
        architecture, tensors = _recognised(tensors, origin, prediction)
    pieces, shapes = _whole(architecture)
    state = taken(tensors, pieces, shapes, origin)
    factor = factor_of(architecture)
    first_stage = {n.removeprefix("first_stage."): state.pop(n) for n in list(state) if n.startswith("first_stage.")}
    channels = architecture.first_stage["latent_channels"]
    first_stage |= {"latent_mean": torch.zeros(channels), "latent_std": torch.full((channels,), 1.0 / factor)}
    first_stage = unfolded(first_stage, metadata, factor)
    state |= {f"first_stage.{name}": tensor for name, tensor in first_stage.items()}
    return Package(architecture, state, list(description.get("tokenizers", [])))


def _whole(architecture: Architecture) -> tuple[list[Piece], dict[str, Tensor]]:
    """All pieces of a model's file with their prefixes, and our tensors on the meta device."""
    network, first_stage = shapes_of_network(architecture), shapes_of_first_stage(architecture)
    parts = [(UNET, "denoiser.network.", unet_to_compvis(network), network)]
    for i, (text, place) in enumerate(zip(architecture.texts, places(architecture), strict=True)):
        parts.append((place, architecture.text_prefix(i), _text_pieces(text, place), shapes_of_text(text)))
    parts.append((FIRST_STAGE, "first_stage.", first_stage_to_compvis(first_stage), first_stage))
    pieces = [
        Piece(place + piece.theirs, tuple(own + name for name in piece.ours), piece.transpose, piece.flat)
        for place, own, some, _ in parts
        for piece in some
    ]
    return pieces, {own + name: tensor for _, own, _, some in parts for name, tensor in some.items()}


def _recognised(
    tensors: dict[str, Tensor], origin: str, prediction: str | None
) -> tuple[Architecture, dict[str, Tensor]]:
    """The architecture by names and shapes, and the tensors without what the model does not use."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    network = recognise.network_arguments(part(UNET), origin)
    texts: tuple[Text, ...]
    numbers: tuple[dict[str, Any], ...] = ()
    native, default = (512, 512), "Epsilon"
    last = {"layer": -2, "final_norm": False}
    if clip := part("conditioner.embedders.0.transformer.text_model."):
        big = part("conditioner.embedders.1.model.")
        first = recognise.clip_text(clip, origin, **last, empty_as_zero=True)
        second = recognise.open_clip_text(big, origin, True, **last, pooled=True, empty_as_zero=True)
        texts, numbers, native = (first, second), (*SIZES, TARGET), (1024, 1024)
    elif big := part("conditioner.embedders.0.model."):
        texts = (recognise.open_clip_text(big, origin, True, **last, pooled=True),)
        numbers, native = (*SIZES, SCORE), (1024, 1024)
    elif whole := part("cond_stage_model.model."):
        unused = "text_projection" in whole  # the file has OpenCLIP's whole tower; SD 2 uses all but its last layer
        texts = (recognise.open_clip_text(whole, origin, False, unused_layers=int(unused)),)
        layer = f"cond_stage_model.model.transformer.resblocks.{texts[0].config['layers']}."
        beside = (layer, "cond_stage_model.model.text_projection")
        tensors = {name: tensor for name, tensor in tensors.items() if not (unused and name.startswith(beside))}
        default = "V"
    elif clip := part("cond_stage_model.transformer.text_model."):
        texts = (recognise.clip_text(clip, origin),)
    else:
        raise UserError(
            f"{origin} holds a UNet without a text encoder that is known here (conditioner.embedders.*, "
            "cond_stage_model.model.*, cond_stage_model.transformer.text_model.*): give the whole model"
        )
    first_stage = recognise.first_stage_arguments(part(FIRST_STAGE), origin)
    known = Architecture(first_stage, network, texts, numbers, SD_SCHEDULE, prediction or default, native)
    return known, tensors
