"""The diffusers folder: model_index.json, scheduler, tokenizers, text encoders, unet and vae, in safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import write_folder
from ldm.conditioning.text import clip_text_from_config
from ldm.errors import UserError
from ldm.interop import diffusers_config as configs
from ldm.interop.names import (
    OLD_ATTENTION,
    first_stage_to_diffusers,
    renamed,
    text_to_transformers,
    unet_to_diffusers,
)
from ldm.interop.own_folder import tokenizer_files
from ldm.interop.package import (
    Architecture,
    Package,
    Text,
    Tokenizer,
    is_masked,
    made,
    require_fitting,
    shapes_of_first_stage,
    shapes_of_network,
    shapes_of_text,
    taken,
)
from ldm.interop.single_file import SCORE, SIZES, TARGET, places
from ldm.interop.statistics import folded, noted, scale_factor, unfolded
from ldm.interop.weight_files import (
    MODEL_FILE,
    TEXT_FILE,
    SHARD_bytes,
    has_raw,
    read_file,
    read_json,
    read_weights,
    write_json,
    write_weights,
)
from ldm.networks.unet import UNet

VERSION = "0.38.0"  # of diffusers, whose layout this is
SD, XL = "StableDiffusion", "StableDiffusionXL"
PIPELINES = tuple(f"{family}{use}Pipeline" for family in (SD, XL) for use in ("", "Img2Img", "Inpaint"))
"""Those whose parts are a model as it is known here; others have more parts, or use these in another way."""

# ---------------------------------------------------------------------------------------------------- writing


def write_diffusers(package: Package, path: Path, shard_bytes: int = SHARD_bytes) -> None:
    """Writes a package as a diffusers folder (a first stage alone: the folder of its autoencoder), all or nothing."""
    architecture = package.architecture
    if architecture.network is None:
        with write_folder(path) as building:
            _write_first_stage(package, building, shard_bytes)
        return
    index = _index(architecture)
    scheduler = configs.scheduler_config(architecture)
    with write_folder(path) as building:
        for folder in ("scheduler", "unet", "vae"):
            (building / folder).mkdir()
        write_json(building / "model_index.json", index)
        write_json(building / "scheduler" / "scheduler_config.json", {**scheduler, "_diffusers_version": VERSION})
        factor = _write_first_stage(package, building / "vae", shard_bytes)
        with torch.device("meta"):
            unet = UNet(**architecture.network)
        config = configs.unet_config(architecture, unet, max(architecture.size) // factor)
        write_json(building / "unet" / "config.json", {**config, "_diffusers_version": VERSION})
        tensors = made(package.part("denoiser.network."), unet_to_diffusers(shapes_of_network(architecture)))
        write_weights(building / "unet", MODEL_FILE, tensors, shard_bytes)
        for i, (text, suffix) in enumerate(zip(architecture.texts, _suffixes(architecture), strict=True)):
            _write_text(
                building / f"text_encoder{suffix}", package.part(architecture.text_prefix(i)), text, shard_bytes
            )
            tokenizer = building / f"tokenizer{suffix}"
            tokenizer.mkdir()
            for name, content in package.tokenizers[i].items():
                (tokenizer / name).write_text(content)


def _suffixes(architecture: Architecture) -> list[str]:
    """What follows "text_encoder" in the folder's names: the refiner has the second of SDXL's two alone."""
    if len(architecture.texts) == 2:
        return ["", "_2"]
    return ["_2"] if architecture.numbers else [""]


def _index(architecture: Architecture) -> dict[str, Any]:
    places(architecture)  # refuses what no pipeline has
    if architecture.first_stage["codebook"]:
        raise UserError(
            "diffusers' Stable Diffusion pipelines decode with an AutoencoderKL; this model's first stage has a "
            "codebook: give --to single_file, or convert the first stage alone, which is a VQModel there"
        )
    base = len(architecture.texts) == 2
    parts: dict[str, Any] = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if not architecture.numbers:
        name = f"{SD}{'Inpaint' if architecture.masked else ''}Pipeline"
        parts |= {"safety_checker": [None, None], "requires_safety_checker": False}
        parts |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    else:
        use = "Inpaint" if architecture.masked else "" if base else "Img2Img"
        name = f"{XL}{use}Pipeline"
        first = (["transformers", "CLIPTextModel"], ["transformers", "CLIPTokenizer"]) if base else ([None] * 2,) * 2
        parts |= {"text_encoder": first[0], "tokenizer": first[1]}
        parts |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        parts |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
        parts |= {"force_zeros_for_empty_prompt": architecture.texts[-1].zero_empty_embedding}
        if not base:
            parts |= {"requires_aesthetics_score": True}
            parts.pop("image_encoder")
    return {"_class_name": name, "_diffusers_version": VERSION, **parts}


def _write_first_stage(package: Package, folder: Path, shard_bytes: int) -> int:
    """Writes an autoencoder's config.json and weights; its downsampling factor."""
    architecture, state = package.architecture, package.part("first_stage.")
    own = scale_factor(state["latent_mean"], state["latent_std"])
    metadata: dict[str, str] = {}
    statistics: dict[str, Any] = {"scaling_factor": own or 1.0} if package.latents_told else {}
    if own is None and architecture.network is not None:  # the pipelines ask for one factor alone
        metadata = noted(state)
        state = folded(state, 1.0)
    elif own is None:
        statistics |= {"latents_mean": state["latent_mean"].tolist(), "latents_std": state["latent_std"].tolist()}
    factor: int = 2 ** (len(architecture.first_stage["encoder"]["channel_mult"]) - 1)
    config = configs.first_stage_config(architecture, statistics, max(architecture.size))
    write_json(folder / "config.json", {**config, "_diffusers_version": VERSION})
    tensors = made(state, first_stage_to_diffusers(shapes_of_first_stage(architecture)))
    write_weights(folder, MODEL_FILE, tensors, shard_bytes, metadata)
    return factor


def _write_text(folder: Path, state: Mapping[str, Tensor], text: Text, shard_bytes: int) -> None:
    with torch.device("meta"):
        config = clip_text_from_config(**text.config).config
    name = "CLIPTextModel"
    if text.projection_dim is not None:
        config.projection_dim = text.projection_dim
        name = "CLIPTextModelWithProjection"
    config.architectures = [name]
    folder.mkdir()
    config.save_pretrained(folder)
    write_weights(folder, TEXT_FILE, made(state, text_to_transformers(shapes_of_text(text), text.prefix)), shard_bytes)


# ---------------------------------------------------------------------------------------------------- reading


def is_diffusers(path: Path) -> bool:
    """Whether a folder is a pipeline's or an autoencoder's."""
    return (path / "model_index.json").is_file() or (path / "config.json").is_file()


def read_diffusers(path: Path, raw: bool = False) -> Package:
    """The model in a diffusers folder, with `raw` weights where it has such beside the averaged ones.

    UserError where a part is missing, or of a kind that is not known here.
    """
    if not (path / "model_index.json").is_file():
        config = read_json(path / "config.json")
        if config.get("_class_name") in ("AutoencoderKL", "VQModel"):
            return _read_first_stage(path)
        what = config.get("_class_name") or ", ".join(config.get("architectures") or ["model"])
        raise UserError(f"{path} holds a {what} alone; give the whole pipeline's folder")
    index = _read_index(path)
    vae = _read_first_stage(path / "vae")
    origin = path / "unet"
    config = read_json(origin / "config.json")
    network = configs.network_arguments(config, str(origin / "config.json"))
    schedule, prediction = configs.schedule_of(read_json(path / "scheduler" / "scheduler_config.json"), str(path))
    suffixes = [suffix for suffix in ("", "_2") if (index.get(f"text_encoder{suffix}") or [None])[0] is not None]
    sdxl = network["vector_dim"] is not None
    if not suffixes or (not sdxl and suffixes != [""]):
        raise UserError(
            f"{path} ({index.get('_class_name')}) has no text encoder as Stable Diffusion's pipelines have it"
        )
    tokenizers = [_read_tokenizer(path / f"tokenizer{suffix}") for suffix in suffixes]
    channels = config.get("addition_time_embed_dim") or 256
    numbers = (*SIZES, SCORE if len(suffixes) == 1 else TARGET) if sdxl else ()
    factor = 2 ** (len(vae.architecture.first_stage["encoder"]["channel_mult"]) - 1)
    size = configs.size_of(config, factor)
    numbers = tuple(_number(number, channels, size) for number in numbers)
    texts, towers = [], []
    for suffix, tokenizer in zip(suffixes, tokenizers, strict=True):
        folder = path / f"text_encoder{suffix}"
        zeros = bool(index.get("force_zeros_for_empty_prompt", True)) and len(suffixes) == 2
        given = read_weights(folder, TEXT_FILE)[0]
        towers.append({name: t for name, t in given.items() if not name.endswith("position_ids")})
        texts.append(_text(folder, towers[-1], tokenizer, sdxl, suffix == "_2", zeros))
    first_stage = vae.architecture.first_stage
    masked = is_masked(first_stage, network)
    architecture = Architecture(first_stage, network, tuple(texts), numbers, schedule, prediction, size, masked)
    require_fitting(architecture, str(path))
    shapes = shapes_of_network(architecture)
    unet = taken(read_weights(origin, MODEL_FILE, raw)[0], unet_to_diffusers(shapes), shapes, str(origin))
    state = {f"denoiser.network.{name}": tensor for name, tensor in unet.items()} | vae.state
    for i, (text, tower) in enumerate(zip(texts, towers, strict=True)):
        own = shapes_of_text(text)
        found = taken(tower, text_to_transformers(own, text.prefix), own, str(path / f"text_encoder{suffixes[i]}"))
        state |= {architecture.text_prefix(i) + name: tensor for name, tensor in found.items()}
    return Package(architecture, state, tokenizers, averaged=has_raw(origin, MODEL_FILE) and not raw)


def _read_index(path: Path) -> dict[str, Any]:
    """model_index.json; UserError for a pipeline with other parts than a model here."""
    index = read_json(path / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise UserError(
            f"{path} is the folder of a {name}, which has other parts than a model here, or uses them in another way; "
            f"expected {', '.join(PIPELINES)}"
        )
    return index


def _number(arguments: Mapping[str, Any], channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """A MicroConditioner's arguments at this model's native size and features per number."""
    default = list(size) if arguments["field"].endswith("_size") else arguments["default"]
    return {**arguments, "default": default, **({} if channels == 256 else {"channels": channels})}


def is_first_stage_file(path: Path) -> bool:
    """Whether a file is the weights of an autoencoder's folder, which says what it is."""
    beside = path.parent / "config.json"
    own = path.name.startswith(MODEL_FILE) and "-of-" not in path.name and beside.is_file()
    return own and read_json(beside).get("_class_name") in ("AutoencoderKL", "VQModel")


def read_first_stage_file(path: Path) -> Package:
    """The first stage in such a file."""
    return _read_first_stage(path.parent, path)


def _read_first_stage(folder: Path, file: Path | None = None) -> Package:
    """The autoencoder in a folder, of its weights' files the given one."""
    config = read_json(folder / "config.json")
    architecture = Architecture(configs.first_stage_arguments(config, str(folder / "config.json")))
    tensors, metadata = read_weights(folder, MODEL_FILE) if file is None else read_file(file)
    names = renamed(tensors, OLD_ATTENTION)
    shapes = shapes_of_first_stage(architecture)
    given = {names[name]: tensor for name, tensor in tensors.items()}
    state = taken(given, first_stage_to_diffusers(shapes), shapes, str(folder))
    mean, std = configs.statistics_of(config, architecture.first_stage["latent_channels"])
    state |= {"latent_mean": mean, "latent_std": std}
    state = unfolded(state, metadata, 1.0)
    return Package(architecture, {f"first_stage.{name}": tensor for name, tensor in state.items()})


def _text(
    folder: Path,
    tower: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    sdxl: bool,
    projected: bool,
    zero_empty_embedding: bool,
) -> Text:
    """The text encoder whose weights are in `tower`, and what a pipeline takes of it."""
    config = read_json(folder / "config.json")
    config = config.get("text_config", config)
    configs.refuse_others(config, configs.TEXT_ALLOWED, str(folder / "config.json"))
    vocab = config.get("vocab_size", 49408)
    arguments = {
        "hidden_size": config.get("hidden_size", 512),
        "layers": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 8),
        "intermediate": config.get("intermediate_size", 2048),
        "vocab": vocab,
        "max_position": config.get("max_position_embeddings", 77),
        "act": config.get("hidden_act", "quick_gelu"),
        "bos": config.get("bos_token_id", vocab - 2),
        "eos": config.get("eos_token_id", vocab - 1),
        "pad": config.get("pad_token_id", vocab - 1),
    }
    told = json.loads(tokenizer.get("tokenizer_config.json", "{}"))
    return Text(
        arguments,
        config.get("projection_dim", 512) if projected else None,
        layer=-2 if sdxl else -1,
        final_norm=not sdxl,
        pooled=projected,
        max_length=min(int(told.get("model_max_length", 77)), arguments["max_position"]),
        zero_empty_embedding=zero_empty_embedding,
        prefix="text_model." if any(name.startswith("text_model.") for name in tower) else "",
    )


def _read_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer's files; UserError where it has no words."""
    files = tokenizer_files(folder) if folder.is_dir() else {}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files.keys():
        raise UserError(
            f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt; copy the folder again"
        )
    return files
