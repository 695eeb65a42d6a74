"""The single file of CompVis and sgm: SD 1, SD 2, SDXL base and refiner, and first stages alone.

What names and shapes do not tell (heads of another width, groups, the prediction, a tokenizer of one's own) is in
the file's metadata under `ldm` where this module wrote it; other tools do not ask for it.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import load_tensors, load_torch, save_tensors
from ldm.diffusion.schedule import ScaledLinear
from ldm.errors import UserError
from ldm.interop import recognise
from ldm.interop.names import (
    Rules,
    WeightMapping,
    first_stage_as_compvis,
    first_stage_to_compvis,
    renamed,
    text_to_open_clip,
    text_to_transformers,
    unet_to_compvis,
)
from ldm.interop.package import (
    Architecture,
    Package,
    Text,
    is_masked,
    made,
    part_of,
    require_fitting,
    shapes_of_first_stage,
    shapes_of_network,
    shapes_of_text,
    taken,
)
from ldm.interop.recognise import FIRST_STAGE, UNET
from ldm.interop.statistics import folded, is_std_of, noted, unfolded
from ldm.interop.weight_files import tensors_of

METADATA = "ldm"
SD_FACTOR, SDXL_FACTOR = 0.18215, 0.13025
SD_SCHEDULE = {"kind": "ScaledLinear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}
SIZES = [{"field": name, "default": default} for name, default in (("original_size", [1024, 1024]), ("crop", [0, 0]))]
TARGET = {"field": "target_size", "default": [1024, 1024]}
SCORE = {"field": "aesthetic_score", "default": [6.0], "empty": [2.5]}
# What these files hold beside the weights: schedules, averages' counters, losses, numbers that are computed.
BESIDE = re.compile(
    r"^(betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights|scale_factor|global_step"
    r"|denoiser\.(log_)?sigmas|model_ema\..*|(first_stage_model\.)?loss\..*|.*\.position_ids|.*logit_scale"
    r"|.*\.attn_mask|.*\.transformer\.text_projection\.weight|v_pred|ztsnr)$"
)
MARKS = ("scale_factor", "v_pred", "ztsnr", "alphas_cumprod")  # of these, those that say something
OLD_TEXT: Rules = [  # how transformers named CLIP's parts once, as files of that time still do
    (r"^(cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\.", r"\1text_model.\2."),
]
LAST = {"layer": -2, "final_norm": False}  # what SDXL takes of its text encoders
VIT_H = (1024, 24)  # width and layers of OpenCLIP ViT-H, of which SD 2 uses all but the last


def places(architecture: Architecture) -> list[str]:
    """Each text encoder's prefix in the file. UserError for a model that this layout has no room for."""
    network, texts = architecture.network or {}, architecture.texts
    numbers = [part["field"] for part in architecture.numbers]
    if not numbers and len(texts) == 1:
        open_clip = bool(network.get("use_linear_projection"))
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


def _text_pieces(text: Text, place: str) -> list[WeightMapping]:
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
        if package.latents_told:
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

    `weights`: `ema` takes CompVis' averages where the file has such, `raw` the others. `prediction` is the class's name
    where names and shapes do not tell (SD 2: V, where none is given). UserError for anything else.
    """
    tensors, metadata = _tensors(path)
    recognise.refuse_adapters(list(tensors), str(path))
    averaged = _averaged(tensors) if weights == "ema" else {}
    tensors |= averaged
    told = _Told(metadata, {name: tensors[name] for name in MARKS if name in tensors})
    tensors = {name: tensor for name, tensor in tensors.items() if not BESIDE.match(name)}
    if any(name.startswith(UNET) for name in tensors):
        package = _model(tensors, told, str(path), prediction)
    else:
        if any(name.startswith(FIRST_STAGE) for name in tensors):
            tensors = {name.removeprefix(FIRST_STAGE): tensor for name, tensor in tensors.items()}
        if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= tensors.keys():
            raise recognise.unknown(list(tensors), str(path))
        names = first_stage_as_compvis(tensors)
        package = _bare_first_stage({names[name]: t for name, t in tensors.items()}, told, str(path))
    return replace(package, averaged=bool(averaged))


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{" or path.suffix == ".safetensors":  # a header's length in 8 bytes, then JSON
        return load_tensors(path)
    state = load_torch(path)
    if isinstance(state, dict):
        recognise.refuse_adapters([name for name in state if isinstance(name, str)], str(path))
    return tensors_of(state, path), {}


def _averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CompVis' averages (`model_ema.*`, names without dots) under the names of what they are averages of."""
    found = {}
    for name in tensors:
        average = "model_ema." + name.removeprefix("model.").replace(".", "")
        if average in tensors and not name.startswith("model_ema."):
            found[name] = tensors[average]
    return found


@dataclass(frozen=True)
class _Told:
    """What a file says beside its weights: metadata, and tensors that are marks."""

    metadata: dict[str, str]
    marks: dict[str, Tensor]

    def description(self, origin: str) -> dict[str, Any]:
        """What this module wrote under METADATA; empty where it did not write the file."""
        try:
            found = json.loads(self.metadata.get(METADATA, "{}"))
            if found:
                found["architecture"]
            return dict(found)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{origin}: its metadata {METADATA!r} are not readable ({error!r})") from error

    def prediction(self) -> str | None:
        """The class's name, where a mark or Stability's model specification says it."""
        if "v_pred" in self.marks:
            return "V"
        spec = self.metadata.get("modelspec.prediction_type", "")
        return {"v": "V", "v_prediction": "V", "epsilon": "Epsilon"}.get(spec)

    def schedule(self) -> dict[str, Any]:
        """Stable Diffusion's, rescaled to zero terminal SNR where the file is marked so."""
        return {"kind": "ZeroTerminalSNR", "schedule": SD_SCHEDULE} if "ztsnr" in self.marks else SD_SCHEDULE

    def other_levels(self) -> bool:
        """Whether it has noise levels of another schedule than Stable Diffusion's."""
        given = self.marks.get("alphas_cumprod")
        known = torch.from_numpy(ScaledLinear().alphas_cumprod)
        return given is not None and (
            given.shape != known.shape or not torch.allclose(given.double(), known, rtol=1e-2, atol=1e-3)
        )

    def factor(self, architecture: Architecture) -> float:
        """The latent scale factor: LDM's buffer where it measured one, else what readers assume."""
        measured = self.marks.get("scale_factor")
        return factor_of(architecture) if measured is None else round(float(measured), 7)


def _bare_first_stage(tensors: dict[str, Tensor], told: _Told, origin: str) -> Package:
    description = told.description(origin)
    if description:  # of a whole model where another tool took the rest away
        architecture = Architecture(Architecture.of(description["architecture"]).first_stage)
    else:
        architecture = Architecture(recognise.first_stage_arguments(tensors, origin))
    try:
        shapes = shapes_of_first_stage(architecture)
    except (TypeError, KeyError) as error:
        raise UserError(f"{origin}: its metadata {METADATA!r} do not describe a first stage ({error})") from error
    state = taken(tensors, first_stage_to_compvis(shapes), shapes, origin)
    channels = architecture.first_stage["latent_channels"]
    latents = description.get("latents")
    known = latents or {"latent_mean": [0.0] * channels, "latent_std": [1.0] * channels}
    state |= {name: torch.tensor(values) for name, values in known.items()}
    named = {f"first_stage.{name}": tensor for name, tensor in state.items()}
    return Package(architecture, named, latents_told=latents is not None)


def _model(tensors: dict[str, Tensor], told: _Told, origin: str, prediction: str | None) -> Package:
    notes: list[str] = []
    description = told.description(origin)
    if description:
        architecture = Architecture.of(description["architecture"])
    else:
        architecture, tensors = _recognised(_modern(tensors), told, origin, prediction, notes)
    try:
        require_fitting(architecture, origin)
        pieces, shapes = _whole(architecture)
    except (TypeError, KeyError) as error:
        raise UserError(f"{origin}: its metadata {METADATA!r} do not describe a model ({error})") from error
    state = taken(tensors, pieces, shapes, origin)
    first_stage = {n.removeprefix("first_stage."): state.pop(n) for n in list(state) if n.startswith("first_stage.")}
    channels, factor = architecture.first_stage["latent_channels"], told.factor(architecture)
    first_stage |= {"latent_mean": torch.zeros(channels), "latent_std": torch.full((channels,), 1.0 / factor)}
    first_stage = unfolded(first_stage, told.metadata, factor)
    state |= {f"first_stage.{name}": tensor for name, tensor in first_stage.items()}
    return Package(architecture, state, list(description.get("tokenizers", [])), notes=notes)


def _whole(architecture: Architecture) -> tuple[list[WeightMapping], dict[str, Tensor]]:
    """All pieces of a model's file with their prefixes, and our tensors on the meta device."""
    network, first_stage = shapes_of_network(architecture), shapes_of_first_stage(architecture)
    parts = [(UNET, "denoiser.network.", unet_to_compvis(network), network)]
    for i, (text, place) in enumerate(zip(architecture.texts, places(architecture), strict=True)):
        parts.append((place, architecture.text_prefix(i), _text_pieces(text, place), shapes_of_text(text)))
    parts.append((FIRST_STAGE, "first_stage.", first_stage_to_compvis(first_stage), first_stage))
    pieces = [
        WeightMapping(place + piece.theirs, tuple(own + name for name in piece.ours), piece.transpose, piece.flat)
        for place, own, some, _ in parts
        for piece in some
    ]
    return pieces, {own + name: tensor for _, own, _, some in parts for name, tensor in some.items()}


def _modern(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with today's names of the text encoder: CLIP's old ones, and SD Turbo's, which is SD 2 in sgm's."""
    rules = list(OLD_TEXT)
    if f"{UNET}label_emb.0.0.weight" not in tensors:
        rules.append((r"^conditioner\.embedders\.0\.model\.", "cond_stage_model.model."))
    names = renamed(tensors, rules)
    return {names[name]: tensor for name, tensor in tensors.items()}


def _recognised(
    tensors: dict[str, Tensor], told: _Told, origin: str, prediction: str | None, notes: list[str]
) -> tuple[Architecture, dict[str, Tensor]]:
    """The architecture by names and shapes, and the tensors without what the model does not use.

    `notes` gets what had to be assumed.
    """
    network = recognise.network_arguments(part_of(tensors, UNET), origin)
    texts, numbers, unused = _conditions(tensors, origin)
    predicted, size = told.prediction() or prediction, (1024, 1024) if numbers else (512, 512)
    if not numbers and texts[0].config["act"] == "gelu":  # SD 2
        if predicted is None:
            predicted = "V"
            notes.append(
                f"{origin} does not say what its UNet predicts: v is assumed, as in SD 2's files for 768 pixels; "
                "where it is one for 512 pixels (base), give --prediction epsilon"
            )
        size = (768, 768) if predicted == "V" else size
    if told.other_levels():
        notes.append(f"{origin} has other noise levels (alphas_cumprod) than Stable Diffusion's, which are assumed")
    given = part_of(tensors, FIRST_STAGE)
    if not given:
        raise UserError(f"{origin} has no first stage ({FIRST_STAGE}*): give the whole model's file, one with its VAE")
    first_stage = recognise.first_stage_arguments(given, origin)
    known = Architecture(
        first_stage,
        network,
        texts,
        numbers,
        told.schedule(),
        predicted or "Epsilon",
        size,
        is_masked(first_stage, network),
    )
    return known, {name: tensor for name, tensor in tensors.items() if not unused or not name.startswith(unused)}


def _conditions(
    tensors: dict[str, Tensor], origin: str
) -> tuple[tuple[Text, ...], tuple[dict[str, Any], ...], tuple[str, ...]]:
    """The text encoders, the numbers beside them, and the beginnings of the names that are not used."""
    if clip := part_of(tensors, "conditioner.embedders.0.transformer.text_model."):
        big = part_of(tensors, "conditioner.embedders.1.model.")
        first = recognise.clip_text(clip, origin, **LAST, zero_empty_embedding=True)
        second = recognise.open_clip_text(big, origin, True, **LAST, pooled=True, zero_empty_embedding=True)
        return (first, second), (*SIZES, TARGET), ()
    if big := part_of(tensors, "conditioner.embedders.0.model."):
        return (recognise.open_clip_text(big, origin, True, **LAST, pooled=True),), (*SIZES, SCORE), ()
    if tower := part_of(tensors, "cond_stage_model.model."):
        text, unused = _sd2_text(tower, origin)
        return (text,), (), unused
    if clip := part_of(tensors, "cond_stage_model.transformer.text_model."):
        return (recognise.clip_text(clip, origin),), (), ()
    raise UserError(
        f"{origin} holds a UNet without a text encoder that is known here (conditioner.embedders.*, "
        "cond_stage_model.model.*, cond_stage_model.transformer.text_model.*): give the whole model"
    )


def _sd2_text(tower: dict[str, Tensor], origin: str) -> tuple[Text, tuple[str, ...]]:
    """SD 2's text encoder in a file's OpenCLIP tower, and the beginnings of the names that it does not use.

    The published files have the whole tower, of which SD 2 uses all but the last layer; others leave that away, and
    the projection may be there with it or without.
    """
    whole = recognise.open_clip_text(tower, origin, False).config
    shape = whole["hidden_size"], whole["layers"]
    complete = shape == VIT_H if shape[0] == VIT_H[0] else "text_projection" in tower
    text = recognise.open_clip_text(tower, origin, False, unused_layers=int(complete))
    prefix = "cond_stage_model.model."
    last = (f"{prefix}transformer.resblocks.{text.config['layers']}.",) if complete else ()
    return text, (*last, f"{prefix}text_projection")
