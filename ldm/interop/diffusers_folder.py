"""The diffusers folder: model_index.json, scheduler, tokenizers, text encoders, unet and vae, in safetensors."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import write_folder
from ldm.conditioning.image import MaskedImage
from ldm.errors import UserError
from ldm.first_stage.regularizer import VQRegularizer
from ldm.interop import diffusers_config as configs
from ldm.interop import nodes
from ldm.interop.names import (
    OLD_ATTENTION,
    ToMappings,
    first_stage_to_diffusers,
    renamed,
    text_to_transformers,
    unet_to_diffusers,
)
from ldm.interop.nodes import NETWORK, Node
from ldm.interop.package import Package, Tokenizer, from_layout, to_layout
from ldm.interop.recognise import micro_conditioners
from ldm.interop.single_file import text_places
from ldm.interop.statistics import fold_latent_stats, scale_factor, stats_metadata, unfold_latent_stats
from ldm.interop.tokenizers import tokenizer_files
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

VERSION = "0.38.0"  # of diffusers, whose layout this is
SD, XL = "StableDiffusion", "StableDiffusionXL"
PIPELINES = tuple(f"{family}{use}Pipeline" for family in (SD, XL) for use in ("", "Img2Img", "Inpaint"))
"""Those whose parts are a model as it is known here; others have more parts, or use these in another way."""

# ---------------------------------------------------------------------------------------------------- writing


def write_diffusers(package: Package, path: Path, shard_bytes: int = SHARD_bytes) -> None:
    """Writes a package as a diffusers folder (a first stage alone: the folder of its autoencoder), all or nothing."""
    model = package.model
    if package.kind == "first_stage":
        with write_folder(path) as building:
            _write_first_stage(package, building, shard_bytes)
        return
    index, scheduler = _index(model), configs.scheduler_config(model)
    suffixes = _suffixes(model)
    folders: dict[str, tuple[str, ToMappings]] = {NETWORK: ("unet", unet_to_diffusers)}
    for suffix, prefix in zip(suffixes, nodes.texts(model), strict=True):
        folders[prefix] = (f"text_encoder{suffix}", partial(text_to_transformers, prefix="text_model."))
    size = max(package.config["data"]["size"])
    with write_folder(path) as building:
        for folder in ("scheduler", "vae", *(folder for folder, _ in folders.values())):
            (building / folder).mkdir()
        write_json(building / "model_index.json", index)
        write_json(building / "scheduler" / "scheduler_config.json", {**scheduler, "_diffusers_version": VERSION})
        factor = _write_first_stage(package, building / "vae", shard_bytes)
        config = configs.unet_config(model, size // factor)
        write_json(building / "unet" / "config.json", {**config, "_diffusers_version": VERSION})
        for prefix, shapes in nodes.parts(model).items():
            if prefix in folders:
                folder, to_mappings = folders[prefix]
                tensors = to_layout(package.part(prefix), to_mappings(shapes))
                write_weights(building / folder, MODEL_FILE if folder == "unet" else TEXT_FILE, tensors, shard_bytes)
        for suffix, text, files in zip(suffixes, nodes.texts(model).values(), package.tokenizers, strict=True):
            _save_text_config(text, building / f"text_encoder{suffix}")
            (building / f"tokenizer{suffix}").mkdir()
            for name, content in files.items():
                (building / f"tokenizer{suffix}" / name).write_text(content)


def _suffixes(model: Node) -> list[str]:
    """What follows "text_encoder" in the folder's names: the refiner has the second of SDXL's two alone."""
    if len(nodes.texts(model)) == 2:
        return ["", "_2"]
    return ["_2"] if nodes.numbers(model) else [""]


def _index(model: Node) -> dict[str, Any]:
    text_places(model)  # refuses what no pipeline has
    if nodes.is_of(model["first_stage"]["regularizer"], VQRegularizer):
        raise UserError(
            "diffusers' Stable Diffusion pipelines decode with an AutoencoderKL; this model's first stage has a "
            "codebook: give --to single_file, or convert the first stage alone, which is a VQModel there"
        )
    texts, inpaint = list(nodes.texts(model).values()), "Inpaint" if nodes.is_masked(model) else ""
    base = len(texts) == 2
    parts: dict[str, Any] = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if not nodes.numbers(model):
        name = f"{SD}{inpaint}Pipeline"
        parts |= {"safety_checker": [None, None], "requires_safety_checker": False}
        parts |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    else:
        name = f"{XL}{inpaint or ('' if base else 'Img2Img')}Pipeline"
        first = (["transformers", "CLIPTextModel"], ["transformers", "CLIPTokenizer"]) if base else ([None] * 2,) * 2
        parts |= {"text_encoder": first[0], "tokenizer": first[1]}
        parts |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        parts |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
        parts |= {"force_zeros_for_empty_prompt": nodes.arguments(texts[-1])["zero_empty_embedding"]}
        if not base:
            parts |= {"requires_aesthetics_score": True}
            parts.pop("image_encoder")
    return {"_class_name": name, "_diffusers_version": VERSION, **parts}


def _write_first_stage(package: Package, folder: Path, shard_bytes: int) -> int:
    """Writes an autoencoder's config.json and weights; its downsampling factor."""
    first_stage = package.first_stage
    state = first_stage.state
    factor = scale_factor(state["latent_mean"], state["latent_std"])
    metadata: dict[str, str] = {}
    statistics: dict[str, Any] = {"scaling_factor": factor or 1.0} if package.has_latent_stats else {}
    if factor is None and package.kind == "diffusion":  # the pipelines ask for one factor alone
        metadata = stats_metadata(state)
        state = fold_latent_stats(state, 1.0)
    elif factor is None:
        statistics |= {"latents_mean": state["latent_mean"].tolist(), "latents_std": state["latent_std"].tolist()}
    size = max(package.config.get("data", {"size": [512]})["size"])
    config = configs.first_stage_config(first_stage.model, statistics, size)
    write_json(folder / "config.json", {**config, "_diffusers_version": VERSION})
    tensors = to_layout(state, first_stage_to_diffusers(nodes.shapes(first_stage.model)))
    write_weights(folder, MODEL_FILE, tensors, shard_bytes, metadata)
    return _factor(first_stage.model)


def _factor(first_stage: Node) -> int:
    """How many times smaller the latents are than the pictures."""
    return int(2 ** (len(first_stage["encoder"]["channel_mult"]) - 1))


def _save_text_config(text: Node, folder: Path) -> None:
    with torch.device("meta"):
        config = nodes.build(text["encoder"]).config
    config.architectures = ["CLIPTextModel"]
    if text.get("projection") is not None:
        config.projection_dim = text["projection"]["projection_dim"]
        config.architectures = ["CLIPTextModelWithProjection"]
    config.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------- reading


def is_diffusers(path: Path) -> bool:
    """Whether a folder is a pipeline's or an autoencoder's."""
    return (path / "model_index.json").is_file() or (path / "config.json").is_file()


def read_diffusers(path: Path, raw: bool = False) -> Package:
    """The model in a diffusers folder, with `raw` weights where it has such next to the averaged ones.

    UserError where a part is missing, or of a kind that is not known here.
    """
    if not (path / "model_index.json").is_file():
        config = read_json(path / "config.json")
        if config.get("_class_name") in ("AutoencoderKL", "VQModel"):
            return read_first_stage(path)
        what = config.get("_class_name") or ", ".join(config.get("architectures") or ["model"])
        raise UserError(f"{path} holds a {what} alone; give the whole pipeline's folder")
    index = _read_index(path)
    first_stage, unet = read_first_stage(path / "vae"), path / "unet"
    config = read_json(unet / "config.json")
    network = configs.unet_node(config, str(unet / "config.json"))
    schedule, prediction = configs.schedule_nodes(read_json(path / "scheduler" / "scheduler_config.json"), str(path))
    suffixes = [suffix for suffix in ("", "_2") if (index.get(f"text_encoder{suffix}") or [None])[0] is not None]
    sdxl = network["vector_dim"] is not None
    if not suffixes or (not sdxl and suffixes != [""]):
        raise UserError(
            f"{path} ({index.get('_class_name')}) has no text encoder as Stable Diffusion's pipelines have it"
        )
    size = configs.size_of(config, _factor(first_stage.model))
    tokenizers = [_read_tokenizer(path / f"tokenizer{suffix}") for suffix in suffixes]
    options: dict[str, Any] = {"layer": -2, "final_norm": False} if sdxl else {}
    options["zero_empty_embedding"] = len(suffixes) == 2 and bool(index.get("force_zeros_for_empty_prompt", True))
    conditioners: list[Node] = []
    for suffix, files in zip(suffixes, tokenizers, strict=True):
        place, projected = path / f"text_encoder{suffix}" / "config.json", suffix == "_2"
        text = configs.text_node(read_json(place), files, projected, str(place), pooled=projected, **options)
        conditioners.append(text)
    if sdxl:
        last = "target_size" if len(suffixes) == 2 else "aesthetic_score"
        conditioners += micro_conditioners(last, size, config.get("addition_time_embed_dim") or 256)
    if network["in_channels"] == 2 * first_stage.model["latent_channels"] + 1:
        conditioners.append(nodes.node(MaskedImage, mask_first=True))
    conditioner = nodes.conditioner(conditioners)
    model = nodes.latent_diffusion(network, conditioner, schedule, prediction, first_stage.model)
    nodes.require_fitting(model, str(path))
    shapes = nodes.shapes(network)
    tensors = from_layout(read_weights(unet, MODEL_FILE, raw)[0], unet_to_diffusers(shapes), shapes, str(unet))
    state = {NETWORK + name: tensor for name, tensor in tensors.items()}
    state |= {f"first_stage.{name}": tensor for name, tensor in first_stage.state.items()}
    for suffix, (prefix, text) in zip(suffixes, nodes.texts(model).items(), strict=True):
        state |= {prefix + name: tensor for name, tensor in _read_text(path / f"text_encoder{suffix}", text).items()}
    averaged = has_raw(unet, MODEL_FILE) and not raw
    return Package(nodes.model_config(model, size), state, tokenizers, str(path), averaged=averaged)


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


def is_first_stage_file(path: Path) -> bool:
    """Whether a file is the weights of an autoencoder's folder, which says what it is."""
    config = path.parent / "config.json"
    named = path.name.startswith(MODEL_FILE) and "-of-" not in path.name and config.is_file()
    return named and read_json(config).get("_class_name") in ("AutoencoderKL", "VQModel")


def read_first_stage(folder: Path, file: Path | None = None) -> Package:
    """The autoencoder in a folder, of its weights' files the given one."""
    config = read_json(folder / "config.json")
    model = configs.first_stage_node(config, str(folder / "config.json"))
    tensors, metadata = read_weights(folder, MODEL_FILE) if file is None else read_file(file)
    names = renamed(tensors, OLD_ATTENTION)
    shapes = nodes.shapes(model)
    tensors = {names[name]: tensor for name, tensor in tensors.items()}
    state = from_layout(tensors, first_stage_to_diffusers(shapes), shapes, str(folder))
    mean, std = configs.statistics_of(config, model["latent_channels"])
    state |= {"latent_mean": mean, "latent_std": std}
    return Package({"model": model}, unfold_latent_stats(state, metadata, 1.0), origin=str(file or folder))


def _read_text(folder: Path, text: Node) -> Mapping[str, Tensor]:
    """A text encoder's weights by our names; older and newer transformers have a prefix or none."""
    tensors = {n: t for n, t in read_weights(folder, TEXT_FILE)[0].items() if not n.endswith("position_ids")}
    prefix = "text_model." if any(name.startswith("text_model.") for name in tensors) else ""
    shapes = nodes.text_shapes(text)
    return from_layout(tensors, text_to_transformers(shapes, prefix), shapes, str(folder))


def _read_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer's files; UserError where it has no words."""
    files = tokenizer_files(folder) if folder.is_dir() else {}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files.keys():
        raise UserError(
            f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt; copy the folder again"
        )
    return files
