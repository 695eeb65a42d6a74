"""The single file of CompVis and sgm: SD 1, SD 2, SDXL base and refiner, and first stages alone.

What names and shapes do not say (heads of another width, groups, the prediction, a custom tokenizer) is in the file's
metadata under `ldm` where this module wrote it, as the model's node; other tools do not ask for it.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import load_tensors, load_torch, save_tensors
from ldm.conditioning.image import MaskedImage
from ldm.diffusion.prediction import Epsilon, V
from ldm.diffusion.schedule import ScaledLinear, ZeroTerminalSNR
from ldm.errors import UserError
from ldm.interop import nodes, recognise
from ldm.interop.names import (
    Rules,
    ToMappings,
    WeightMapping,
    first_stage_as_compvis,
    first_stage_to_compvis,
    renamed,
    text_to_open_clip,
    text_to_transformers,
    unet_to_compvis,
)
from ldm.interop.nodes import NETWORK, STATISTICS, Node, Shapes, readable
from ldm.interop.package import Package, from_layout, part_of, to_layout
from ldm.interop.recognise import FIRST_STAGE, UNET
from ldm.interop.statistics import (
    SD_FACTOR,
    SDXL_FACTOR,
    fold_latent_stats,
    is_std_of,
    stats_metadata,
    unfold_latent_stats,
)
from ldm.interop.tokenizers import require_text_files
from ldm.interop.weight_files import tensors_of

METADATA = "ldm"
SD_SCHEDULE = nodes.node(ScaledLinear, beta_start=0.00085, beta_end=0.012, steps=1000)
PREDICTIONS = {"epsilon": Epsilon, "v": V}
# What these files hold in addition to the weights: schedules, averages' counters, losses, computed numbers.
NOT_WEIGHTS = re.compile(
    r"^(betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights|scale_factor|global_step"
    r"|denoiser\.(log_)?sigmas|model_ema\..*|(first_stage_model\.)?loss\..*|.*\.position_ids|.*logit_scale"
    r"|.*\.attn_mask|.*\.transformer\.text_projection\.weight|v_pred|ztsnr)$"
)
MARKS = ("scale_factor", "v_pred", "ztsnr", "alphas_cumprod")  # of these, those that say something of the model
OLD_TEXT: Rules = [  # how transformers named CLIP's parts once, as files of that time still do
    (r"^(cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\.", r"\1text_model.\2."),
]

CLIP_TEXT = partial(text_to_transformers, prefix="")


def text_places(model: Node) -> list[str]:
    """Each text encoder's prefix in the file. UserError for a model that this layout has no room for."""
    count, numbers = len(nodes.texts(model)), [part["field"] for part in nodes.numbers(model)]
    if not numbers and count == 1:
        open_clip = nodes.arguments(model["denoiser"]["network"])["use_linear_projection"]
        return ["cond_stage_model.model." if open_clip else "cond_stage_model.transformer.text_model."]
    if numbers == ["original_size", "crop", "target_size"] and count == 2:
        return ["conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."]
    if numbers == ["original_size", "crop", "aesthetic_score"] and count == 1:
        return ["conditioner.embedders.0.model."]
    raise UserError(
        f"a single file has no place for this model's conditions ({count} text encoders, {numbers or 'no'} "
        "numbers): it holds SD 1, SD 2, SDXL base or refiner, or a first stage"
    )


def layout(model: Node) -> tuple[list[WeightMapping], Shapes]:
    """The mappings of all of a model's weights to the file's, and our tensors on the meta device."""
    shapes = nodes.parts(model)
    places: list[tuple[str, str, ToMappings]] = []  # what stands before a part's names there and here
    if nodes.is_first_stage(model):
        places.append(("", "", first_stage_to_compvis))
    else:
        places.append((UNET, NETWORK, unet_to_compvis))
        for place, prefix in zip(text_places(model), nodes.texts(model), strict=True):
            places.append((place, prefix, text_to_open_clip if place.endswith(".model.") else CLIP_TEXT))
        places.append((FIRST_STAGE, "first_stage.", first_stage_to_compvis))
    mappings = [
        mapping.under(place, prefix) for place, prefix, to_mappings in places for mapping in to_mappings(shapes[prefix])
    ]
    return mappings, {prefix + name: tensor for prefix, part in shapes.items() for name, tensor in part.items()}


def scale_factor_of(model: Node) -> float:
    """The latent scale factor that readers of these files assume."""
    return SDXL_FACTOR if nodes.numbers(model) else SD_FACTOR


# ---------------------------------------------------------------------------------------------------- writing


def write_single_file(package: Package, path: Path) -> None:
    """Writes a package as one safetensors file, whole or not at all."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a single file is written as safetensors; give a name that ends in .safetensors")
    metadata, state, model = {"format": "pt"}, package.state, package.model
    first_stage = package.first_stage
    if package.kind == "first_stage":  # whose node says what its latents are normalised by, unless nothing did
        unknown = () if package.has_latent_stats else STATISTICS
        model = {name: value for name, value in first_stage.model.items() if name not in unknown}
    else:
        factor = scale_factor_of(model)
        if first_stage.state["latent_mean"].any() or not is_std_of(first_stage.state["latent_std"], factor):
            metadata |= stats_metadata(first_stage.state)
            folded = fold_latent_stats(first_stage.state, factor)
            state = state | {f"first_stage.{name}": tensor for name, tensor in folded.items()}
    config = {"model": model, "data": package.config.get("data")}
    metadata[METADATA] = json.dumps({"config": config, "tokenizers": package.tokenizers})
    save_tensors(path, to_layout(state, layout(model)[0]), metadata)


# ---------------------------------------------------------------------------------------------------- reading


def read_single_file(path: Path, weights: str = "ema", prediction: str | None = None) -> Package:
    """The model in a `.safetensors`, `.ckpt` or `.pt` file, recognised by its tensors' names and shapes.

    `weights`: `ema` takes CompVis' averages where the file has such, `raw` the others. `prediction` ("epsilon" or "v")
    counts where the file does not say it (SD 2: v, where none is given). UserError for anything else.
    """
    tensors, metadata = _tensors(path)
    recognise.refuse_adapters(list(tensors), str(path))
    averaged = _averaged(tensors) if weights == "ema" else {}
    tensors |= averaged
    hints = Hints(str(path), metadata, {name: tensors[name] for name in MARKS if name in tensors})
    tensors = {name: tensor for name, tensor in tensors.items() if not NOT_WEIGHTS.match(name)}
    description = hints.description()
    if not any(name.startswith(UNET) for name in tensors):
        if any(name.startswith(FIRST_STAGE) for name in tensors):
            tensors = {name.removeprefix(FIRST_STAGE): tensor for name, tensor in tensors.items()}
        if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= tensors.keys():
            raise recognise.unknown(list(tensors), str(path))
        package = _first_stage(tensors, description, hints)
    else:
        if description is None:
            description, tensors = recognised(tensors, hints, prediction)
        elif description.kind == "first_stage":
            raise UserError(f"{path}: its metadata {METADATA!r} describe a first stage, but it holds a UNet")
        package = _model(tensors, description, hints)
    return replace(package, origin=str(path), averaged=bool(averaged))


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
    averages = {}
    for name in tensors:
        average = "model_ema." + name.removeprefix("model.").replace(".", "")
        if average in tensors and not name.startswith("model_ema."):
            averages[name] = tensors[average]
    return averages


@dataclass(frozen=True)
class Hints:
    """What a file says in addition to its weights' names and shapes: metadata, and tensors that are marks."""

    origin: str
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    def description(self) -> Package | None:
        """What this module wrote under METADATA, without weights; None where it did not write the file."""
        if METADATA not in self.metadata:
            return None
        with readable(f"{self.origin}: its metadata {METADATA!r} are not readable"):
            values = json.loads(self.metadata[METADATA])
            config, tokenizers = values["config"], values["tokenizers"]
            nodes.require_plain(config, self.origin)
            model = config["model"]
            nodes.require_counterparts(model)
            if nodes.is_first_stage(model):
                return Package({"model": model}, {}, origin=self.origin)
            model |= {"conditioner": nodes.conditioner(list(nodes.conditioners(model).values()))}
            nodes.require_fitting(model, self.origin)
            height, width = config["data"]["size"]
            if len(tokenizers) not in (0, len(nodes.texts(model))):
                raise UserError(f"{self.origin} has {len(tokenizers)} tokenizers, not one for each text encoder")
            require_text_files(tokenizers, self.origin)
            return Package(nodes.model_config(model, (height, width)), {}, tokenizers, self.origin)

    def prediction(self) -> str | None:
        """What the UNet predicts, where a mark or Stability's model specification says it."""
        if "v_pred" in self.tensors:
            return "v"
        spec = self.metadata.get("modelspec.prediction_type", "")
        return {"v": "v", "v_prediction": "v", "epsilon": "epsilon"}.get(spec)

    def schedule(self) -> Node:
        """Stable Diffusion's, rescaled to zero terminal SNR where the file is marked so."""
        return nodes.node(ZeroTerminalSNR, schedule=SD_SCHEDULE) if "ztsnr" in self.tensors else SD_SCHEDULE

    def other_levels(self) -> bool:
        """Whether it has noise levels of another schedule than Stable Diffusion's."""
        levels = self.tensors.get("alphas_cumprod")
        known = torch.from_numpy(ScaledLinear().alphas_cumprod)
        return levels is not None and (
            levels.shape != known.shape or not torch.allclose(levels.double(), known, rtol=1e-2, atol=1e-3)
        )

    def factor(self, model: Node) -> float:
        """The latent scale factor: LDM's buffer where it measured one, else what readers assume."""
        measured = self.tensors.get("scale_factor")
        return scale_factor_of(model) if measured is None else round(float(measured), 7)


def _first_stage(tensors: dict[str, Tensor], description: Package | None, hints: Hints) -> Package:
    """A first stage alone; the description may be a whole model's, where another tool took the rest away."""
    names = first_stage_as_compvis(tensors)
    tensors = {names[name]: tensor for name, tensor in tensors.items()}
    node = nodes.first_stage_of(description.model) if description else recognise.first_stage_node(tensors, hints.origin)
    known = description is not None and description.kind == "first_stage" and set(STATISTICS) <= node.keys()
    model = {name: value for name, value in node.items() if name not in STATISTICS}
    state = _state(tensors, model, hints.origin)
    for name, default in zip(STATISTICS, (0.0, 1.0), strict=True):
        values = torch.tensor(node[name] if known else default, dtype=torch.float32)
        state[name] = values.expand(model["latent_channels"]).clone()
    return Package({"model": model}, state, has_latent_stats=known)


def _model(tensors: dict[str, Tensor], description: Package, hints: Hints) -> Package:
    """A whole model; its latents' statistics are the scale factor's, or those that were folded into the weights."""
    model = description.model
    state = _state(tensors, model, hints.origin)
    channels, factor = model["first_stage"]["latent_channels"], hints.factor(model)
    first_stage = part_of(state, "first_stage.")
    first_stage |= {"latent_mean": torch.zeros(channels), "latent_std": torch.full((channels,), 1.0 / factor)}
    first_stage = unfold_latent_stats(first_stage, hints.metadata, factor)
    return description.with_state(state | {f"first_stage.{name}": tensor for name, tensor in first_stage.items()})


def _state(tensors: dict[str, Tensor], model: Node, origin: str) -> dict[str, Tensor]:
    with readable(f"{origin}: the description of its model does not build"):
        mappings, shapes = layout(model)
    return from_layout(tensors, mappings, shapes, origin)


# ------------------------------------------------------------------------------------------------- recognising


def modern(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with today's names of the text encoder: CLIP's old ones, and SD Turbo's, which is SD 2 in sgm's."""
    rules = list(OLD_TEXT)
    if f"{UNET}label_emb.0.0.weight" not in tensors:
        rules.append((r"^conditioner\.embedders\.0\.model\.", "cond_stage_model.model."))
    names = renamed(tensors, rules)
    return {names[name]: tensor for name, tensor in tensors.items()}


def recognised(tensors: dict[str, Tensor], hints: Hints, prediction: str | None) -> tuple[Package, dict[str, Tensor]]:
    """The description by names and shapes, and the tensors without what the model does not use."""
    origin = hints.origin
    notes: list[str] = []
    tensors = modern(tensors)
    network = recognise.unet_node(part_of(tensors, UNET), origin)
    conditioners, unused = recognise.conditioner_nodes(tensors, origin)
    prediction = hints.prediction() or prediction
    size = (1024, 1024) if len(conditioners) > 1 else (512, 512)
    if len(conditioners) == 1 and conditioners[0]["encoder"]["act"] == "gelu":  # SD 2
        if prediction is None:
            prediction = "v"
            notes.append(
                f"{origin} does not say what its UNet predicts: v is assumed, as in SD 2's files for 768 pixels; "
                "where it is one for 512 pixels (base), give --prediction epsilon"
            )
        size = (768, 768) if prediction == "v" else size
    if hints.other_levels():
        notes.append(f"{origin} has other noise levels (alphas_cumprod) than Stable Diffusion's, which are assumed")
    vae = part_of(tensors, FIRST_STAGE)
    if not vae:
        raise UserError(f"{origin} has no first stage ({FIRST_STAGE}*): give the whole model's file, one with its VAE")
    first_stage = recognise.first_stage_node(vae, origin)
    if network["in_channels"] == 2 * first_stage["latent_channels"] + 1:
        conditioners.append(nodes.node(MaskedImage, mask_first=True))
    model = nodes.latent_diffusion(
        network,
        nodes.conditioner(conditioners),
        hints.schedule(),
        nodes.node(PREDICTIONS[prediction or "epsilon"]),
        first_stage,
    )
    nodes.require_fitting(model, origin)
    used = {name: tensor for name, tensor in tensors.items() if not unused or not name.startswith(unused)}
    return Package(nodes.model_config(model, size), {}, notes=notes), used
