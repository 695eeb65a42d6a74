"""The diffusers folder: model_index.json, scheduler, tokenizers, text encoders, unet and vae, in safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import load_tensors, load_torch, save_tensors, write_folder
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
from ldm.interop.package import (
    Architecture,
    Package,
    Text,
    Tokenizer,
    made,
    shapes_of_first_stage,
    shapes_of_network,
    shapes_of_text,
    taken,
)
from ldm.interop.single_file import SCORE, SIZES, TARGET, places
from ldm.interop.statistics import folded, noted, scale_factor, unfolded
from ldm.networks.unet import UNet

VERSION = "0.38.0"  # of diffusers, whose layout this is
SHARD_bytes = 5_000_000_000
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
UNET_FILE, TEXT_FILE = "diffusion_pytorch_model", "model"

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
        _write_json(building / "model_index.json", index)
        _write_json(building / "scheduler" / "scheduler_config.json", {**scheduler, "_diffusers_version": VERSION})
        factor = _write_first_stage(package, building / "vae", shard_bytes)
        with torch.device("meta"):
            unet = UNet(**architecture.network)
        config = configs.unet_config(architecture, unet, max(architecture.size) // factor)
        _write_json(building / "unet" / "config.json", {**config, "_diffusers_version": VERSION})
        tensors = made(package.part("denoiser.network."), unet_to_diffusers(shapes_of_network(architecture)))
        _write_weights(building / "unet", UNET_FILE, tensors, shard_bytes)
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
    parts: dict[str, Any] = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if not architecture.numbers:
        name = PIPELINES[0]
        parts |= {"safety_checker": [None, None], "requires_safety_checker": False}
        parts |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    else:
        base = len(architecture.texts) == 2
        name = PIPELINES[1] if base else PIPELINES[2]
        first = (["transformers", "CLIPTextModel"], ["transformers", "CLIPTokenizer"]) if base else ([None] * 2,) * 2
        parts |= {"text_encoder": first[0], "tokenizer": first[1]}
        parts |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        parts |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
        parts |= {"force_zeros_for_empty_prompt": architecture.texts[-1].empty_as_zero}
        if not base:
            parts |= {"requires_aesthetics_score": True}
            parts.pop("image_encoder")
    return {"_class_name": name, "_diffusers_version": VERSION, **parts}


def _write_first_stage(package: Package, folder: Path, shard_bytes: int) -> int:
    """Writes an autoencoder's config.json and weights; its downsampling factor."""
    architecture, state = package.architecture, package.part("first_stage.")
    own = scale_factor(state["latent_mean"], state["latent_std"])
    metadata: dict[str, str] = {}
    statistics: dict[str, Any] = {"scaling_factor": own or 1.0}
    if own is None and architecture.network is not None:  # the pipelines ask for one factor alone
        metadata = noted(state)
        state = folded(state, 1.0)
    elif own is None:
        statistics |= {"latents_mean": state["latent_mean"].tolist(), "latents_std": state["latent_std"].tolist()}
    factor: int = 2 ** (len(architecture.first_stage["encoder"]["channel_mult"]) - 1)
    config = configs.first_stage_config(architecture, statistics, max(architecture.size))
    _write_json(folder / "config.json", {**config, "_diffusers_version": VERSION})
    tensors = made(state, first_stage_to_diffusers(shapes_of_first_stage(architecture)))
    _write_weights(folder, UNET_FILE, tensors, shard_bytes, metadata)
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
    _write_weights(folder, TEXT_FILE, made(state, text_to_transformers(shapes_of_text(text), text.prefix)), shard_bytes)


def _write_weights(
    folder: Path, name: str, tensors: dict[str, Tensor], shard_bytes: int, metadata: Mapping[str, str] | None = None
) -> None:
    """One safetensors file, or several with an index where they are larger than `shard_bytes` together."""
    told = {"format": "pt", **(metadata or {})}
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += size
    if len(shards) == 1:
        save_tensors(folder / f"{name}.safetensors", shards[0], told)
        return
    files = [f"{name}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_tensors(folder / file, shard, told)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weight_map = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
    _write_json(
        folder / f"{name}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------------------------------------------- reading


def is_diffusers(path: Path) -> bool:
    """Whether a folder is a pipeline's or an autoencoder's."""
    return (path / "model_index.json").is_file() or (path / "config.json").is_file()


def read_diffusers(path: Path) -> Package:
    """The model in a diffusers folder; UserError where a part is missing, or of a kind that is not known here."""
    if not (path / "model_index.json").is_file():
        config = _read_json(path / "config.json")
        if config.get("_class_name") in ("AutoencoderKL", "VQModel"):
            return _read_first_stage(path)
        raise UserError(
            f"{path} holds a {config.get('_class_name') or 'model'} alone; give the whole pipeline's folder"
        )
    index = _read_json(path / "model_index.json")
    vae = _read_first_stage(path / "vae")
    origin = path / "unet"
    config = _read_json(origin / "config.json")
    network = configs.network_arguments(config, str(origin / "config.json"))
    schedule, prediction = configs.schedule_of(_read_json(path / "scheduler" / "scheduler_config.json"), str(path))
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
    side = int(config.get("sample_size") or 64) * factor
    numbers = tuple(_number(number, channels, side) for number in numbers)
    texts = []
    for suffix, tokenizer in zip(suffixes, tokenizers, strict=True):
        zeros = bool(index.get("force_zeros_for_empty_prompt", True)) and len(suffixes) == 2
        texts.append(_text(path / f"text_encoder{suffix}", tokenizer, sdxl, suffix == "_2", zeros))
    architecture = Architecture(
        vae.architecture.first_stage, network, tuple(texts), numbers, schedule, prediction, (side, side)
    )
    shapes = shapes_of_network(architecture)
    unet = taken(_read_weights(origin, UNET_FILE)[0], unet_to_diffusers(shapes), shapes, str(origin))
    state = {f"denoiser.network.{name}": tensor for name, tensor in unet.items()} | vae.state
    for i, (suffix, text) in enumerate(zip(suffixes, texts, strict=True)):
        folder = path / f"text_encoder{suffix}"
        given = {n: t for n, t in _read_weights(folder, TEXT_FILE)[0].items() if not n.endswith("position_ids")}
        own = shapes_of_text(text)
        found = taken(given, text_to_transformers(own, text.prefix), own, str(folder))
        state |= {architecture.text_prefix(i) + name: tensor for name, tensor in found.items()}
    return Package(architecture, state, tokenizers)


def _number(arguments: Mapping[str, Any], channels: int, side: int) -> dict[str, Any]:
    """A MicroConditioner's arguments at this model's native size and features per number."""
    default = [side, side] if arguments["field"].endswith("_size") else arguments["default"]
    return {**arguments, "default": default, **({} if channels == 256 else {"channels": channels})}


def _read_first_stage(folder: Path) -> Package:
    config = _read_json(folder / "config.json")
    architecture = Architecture(configs.first_stage_arguments(config, str(folder / "config.json")))
    tensors, metadata = _read_weights(folder, UNET_FILE)
    names = renamed(tensors, OLD_ATTENTION)
    shapes = shapes_of_first_stage(architecture)
    given = {names[name]: tensor for name, tensor in tensors.items()}
    state = taken(given, first_stage_to_diffusers(shapes), shapes, str(folder))
    factor = float(config.get("scaling_factor") or 1.0)
    channels = architecture.first_stage["latent_channels"]
    mean, std = config.get("latents_mean"), config.get("latents_std")
    state |= {
        "latent_mean": torch.tensor(mean) if mean else torch.zeros(channels),
        "latent_std": (torch.tensor(std or [1.0] * channels, dtype=torch.float64) / factor).float(),
    }
    state = unfolded(state, metadata, 1.0)
    return Package(architecture, {f"first_stage.{name}": tensor for name, tensor in state.items()})


def _text(folder: Path, tokenizer: Tokenizer, sdxl: bool, projected: bool, empty_as_zero: bool) -> Text:
    config = _read_json(folder / "config.json")
    config = config.get("text_config", config)
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
    names = _tensor_names(folder, TEXT_FILE)
    return Text(
        arguments,
        config.get("projection_dim", 512) if projected else None,
        layer=-2 if sdxl else -1,
        final_norm=not sdxl,
        pooled=projected,
        max_length=min(int(told.get("model_max_length", 77)), arguments["max_position"]),
        empty_as_zero=empty_as_zero,
        prefix="text_model." if any(name.startswith("text_model.") for name in names) else "",
    )


def _tensor_names(folder: Path, name: str) -> list[str]:
    return list(_read_weights(folder, name)[0])


def _read_tokenizer(folder: Path) -> Tokenizer:
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: the model's folder is not whole")
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.suffix in (".json", ".txt")}


def _read_weights(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a part, from one file, several with an index, an fp16 variant, or an old .bin."""
    for stem in (name, f"{name}.fp16"):
        index = folder / f"{name}.safetensors.index{stem.removeprefix(name)}.json"
        if (folder / f"{stem}.safetensors").is_file():
            return load_tensors(folder / f"{stem}.safetensors")
        if index.is_file():
            return _read_shards(folder, index)
    old = folder / ("pytorch_model.bin" if name == TEXT_FILE else f"{name}.bin")
    if old.is_file():
        return load_torch(old), {}
    raise UserError(f"{folder} has no weights: expected {name}.safetensors, or its parts with an index")


def _read_shards(folder: Path, index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    files = _read_json(index)["weight_map"]
    missing = sorted({file for file in files.values() if not (folder / file).is_file()})
    if missing:
        raise UserError(f"{folder} is not whole: {', '.join(missing)} is missing; copy the folder again")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in sorted(set(files.values())):
        part, told = load_tensors(folder / file)
        tensors |= part
        metadata |= told
    return tensors, metadata


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the model's folder is not whole") from error
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not what diffusers writes: expected an object")
    return value
