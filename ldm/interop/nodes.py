"""Config nodes: the one description of a model, as it stands under `model` in a model folder's config.yaml.

Readers of other formats give nodes, writers take them apart. A node's `_target_` is called when the model is built, and
files come from strangers: what a file describes may name the parts in KNOWN and nothing else.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning.compose import Compose
from ldm.conditioning.image import MaskedImage
from ldm.conditioning.micro import MicroConditioner
from ldm.conditioning.pretrained import tokenizer_from_pretrained
from ldm.conditioning.text import TextConditioner, clip_projection, clip_text_from_config
from ldm.diffusion import prediction, schedule
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.first_stage.autoencoder import FirstStage
from ldm.first_stage.regularizer import KLRegularizer, VQRegularizer
from ldm.latent_diffusion import LatentDiffusion
from ldm.networks.autoencoder import Decoder, Encoder
from ldm.networks.unet import UNet
from ldm.sampling.ddim import DDIM
from ldm.sampling.grid import Leading, Trailing
from ldm.sampling.guidance import ClassifierFree

Node = dict[str, Any]
"""`_target_`, the dotted name of a class or function, and its arguments; those may be nodes again."""
Shapes = dict[str, Tensor]
"""Tensors on the meta device by name."""

SCHEDULES = (
    schedule.ScaledLinear, schedule.Linear, schedule.Cosine, schedule.ZeroTerminalSNR, schedule.VariancePreserving,
    schedule.RectifiedFlow, schedule.VarianceExploding,
)  # fmt: skip
PREDICTIONS = prediction.Epsilon, prediction.X0, prediction.V, prediction.Flow, prediction.EDM
NETWORK = "denoiser.network."  # what stands before its names in a latent diffusion model's state
STATISTICS = ("latent_mean", "latent_std")
TOKENIZER = "tokenizer"  # tokenizer_path of a converted model, which the loader replaces by its folder's place
SECOND = "second"  # the folder in it that has the second text encoder's


def target(made_by: Callable[..., Any]) -> str:
    """The dotted name of a class or function."""
    return f"{made_by.__module__}.{made_by.__qualname__}"


KNOWN: dict[str, Callable[..., Any]] = {
    target(made_by): made_by
    for made_by in (
        LatentDiffusion, Denoiser, UNet, *SCHEDULES, *PREDICTIONS, FirstStage, Encoder, Decoder, KLRegularizer,
        VQRegularizer, Compose, TextConditioner, MicroConditioner, MaskedImage, clip_text_from_config, clip_projection,
        tokenizer_from_pretrained,
    )
}  # fmt: skip


def node(made_by: Callable[..., Any], **arguments: Any) -> Node:
    """The node of an object: what makes it, and the arguments."""
    return {"_target_": target(made_by), **arguments}


def is_of(described: Mapping[str, Any], *made_by: Callable[..., Any]) -> bool:
    """Whether a node is one of these classes' or functions'."""
    return described["_target_"] in map(target, made_by)


def class_name(described: Mapping[str, Any]) -> str:
    """The name of a node's class, without its module."""
    return str(described["_target_"]).rsplit(".", 1)[-1]


def arguments(described: Node) -> dict[str, Any]:
    """A known node's arguments, with the defaults of those that it does not give."""
    parameters = inspect.signature(KNOWN[described["_target_"]]).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return defaults | {name: value for name, value in described.items() if name != "_target_"}


def build(described: Node) -> Any:
    """The object of a node, with random weights. KeyError for a `_target_` that is not in KNOWN."""
    values = {name: build(part) if isinstance(part, dict) else part for name, part in described.items()}
    return KNOWN[values.pop("_target_")](**values)


def shapes(described: Node) -> Shapes:
    """The parameters of a node's module, without memory."""
    with torch.device("meta"):
        module = build(described)
    return {name: p.detach() for name, p in module.named_parameters()}


@contextmanager
def readable(message: str) -> Iterator[None]:
    """UserError, beginning with the message, where a description lacks what it is read for or has something else."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{message}: it has no {error}") from error
    except (IndexError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{message}: {(str(error) or repr(error)).splitlines()[0]}") from error


# ---------------------------------------------------------------------------------------------- making a description


def first_stage(
    encoder: dict[str, Any], decoder: dict[str, Any], latent_channels: int, quant_conv: bool, entries: int | None = None
) -> Node:
    """A FirstStage's node; `entries` of a codebook, None for KL."""
    regularizer = node(KLRegularizer)
    if entries is not None:
        regularizer = node(VQRegularizer, entries=entries, channels=latent_channels)
    return node(
        FirstStage,
        latent_channels=latent_channels,
        quant_conv=quant_conv,
        encoder=node(Encoder, **encoder),
        regularizer=regularizer,
        decoder=node(Decoder, **decoder),
    )


def text_conditioner(encoder: dict[str, Any], projection_dim: int | None = None, **options: Any) -> Node:
    """A TextConditioner's node of `clip_text_from_config`'s arguments; its tokenizer is set by `conditioner`."""
    if projection_dim is not None:
        options["projection"] = node(clip_projection, hidden_size=encoder["hidden_size"], projection_dim=projection_dim)
    options = {"dropout": 0.1, "frozen": True, "max_length": min(77, encoder["max_position"]), **options}
    return node(TextConditioner, encoder=node(clip_text_from_config, **encoder), **options)


def conditioner(parts: Sequence[Node]) -> Node:
    """One node of several conditioners'; those of text, which come first, get the tokenizers of a model folder."""
    nodes = []
    for i, part in enumerate(parts):
        if is_of(part, TextConditioner):
            place = {"subfolder": SECOND} if i else {}
            part = part | {"tokenizer": node(tokenizer_from_pretrained, name_or_path=TOKENIZER, **place)}
        nodes.append(part)
    return nodes[0] if len(nodes) == 1 else node(Compose, conditioners=nodes)


def latent_diffusion(network: Node, conditioner: Node, schedule: Node, prediction: Node, first_stage: Node) -> Node:
    """A LatentDiffusion's node."""
    denoiser = node(Denoiser, network=network, schedule=schedule, prediction=prediction)
    return node(LatentDiffusion, denoiser=denoiser, conditioner=conditioner, first_stage=first_stage)


def model_config(model: Node, size: Sequence[int] = (512, 512), sampling: Node | None = None) -> Node:
    """A converted model's config.yaml; `size` is [height, width] in pixels that it was last trained at.

    Without `sampling` it is that of diffusers' pipelines.
    """
    if is_first_stage(model):
        return {"model": model}
    has_signal_left = is_of(model["denoiser"]["schedule"], schedule.ScaledLinear, schedule.Linear, schedule.Cosine)
    grid = node(Leading if has_signal_left else Trailing)  # leading times are for those discrete schedules alone
    pipeline = {"sampler": node(DDIM), "grid": grid, "guidance": node(ClassifierFree)}
    return {
        "model": model,
        "sampling": sampling or {**pipeline, "steps": 50, "guidance_scale": 7.5},
        "data": {"size": [int(side) for side in size]},
        "tokenizer_path": TOKENIZER,
        "evaluation": {"sets": {}, "metrics": []},
    }


# ------------------------------------------------------------------------------------------------- taking one apart


def is_first_stage(model: Node) -> bool:
    """Whether it is a first stage alone, of whatever class: a latent diffusion model has one as an argument."""
    return "first_stage" not in model


def first_stage_of(model: Node) -> Node:
    """The first stage in a model, or the model itself where it is one."""
    return model if is_first_stage(model) else model["first_stage"]


def first_stage_prefix(model: Node) -> str:
    """What stands before the first stage's names in the model's state."""
    return "" if is_first_stage(model) else "first_stage."


def conditioners(model: Node) -> dict[str, Node]:
    """The conditioners by what stands before their names in the model's state; none of a first stage alone."""
    if is_first_stage(model):
        return {}
    whole = model["conditioner"]
    if not is_of(whole, Compose):
        return {"conditioner.": whole}
    return {f"conditioner.conditioners.{i}.": part for i, part in enumerate(whole["conditioners"])}


def texts(model: Node) -> dict[str, Node]:
    """Those of them that encode text."""
    return {prefix: part for prefix, part in conditioners(model).items() if is_of(part, TextConditioner)}


def numbers(model: Node) -> list[dict[str, Any]]:
    """The arguments of those that embed numbers."""
    return [arguments(part) for part in conditioners(model).values() if is_of(part, MicroConditioner)]


def is_masked(model: Node) -> bool:
    """Whether a mask and the masked picture's latents are concatenated to the latent (SD's inpainting)."""
    return any(is_of(part, MaskedImage) for part in conditioners(model).values())


def parts(model: Node) -> dict[str, Shapes]:
    """The parameters of the UNet, the text encoders and the first stage, by what stands before their names."""
    shapes_of = {first_stage_prefix(model): shapes(first_stage_of(model))}
    if not is_first_stage(model):
        shapes_of[NETWORK] = shapes(model["denoiser"]["network"])
    return shapes_of | {prefix: text_shapes(text) for prefix, text in texts(model).items()}


def text_shapes(text: Node) -> Shapes:
    """The parameters of a text encoder: `encoder.*` and, where it has one, `projection.weight`."""
    modules = {name: shapes(text[name]) for name in ("encoder", "projection") if text.get(name) is not None}
    return {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.items()}


# ----------------------------------------------------------------------------------------------------- what is refused


def require_plain(value: Any, origin: str) -> None:
    """UserError where a description that was read from a file would build anything but the parts in KNOWN."""
    if isinstance(value, dict):
        special = [name for name in value if name.startswith("_") and name != "_target_"]
        if special or value.get("_target_", target(UNet)) not in list(KNOWN):
            what = special[0] if special else value["_target_"]
            raise UserError(f"{origin} describes a model with {what!r}, which is not known here")
    if isinstance(value, str) and "${" in value:
        raise UserError(f"{origin} describes a model with an interpolation, {value!r}, which is not allowed in a file")
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inside:
        require_plain(part, origin)


def require_counterparts(model: Node) -> None:
    """UserError for a part that no other format has."""
    if not is_first_stage(model):
        _expect(model, LatentDiffusion)
        denoiser = model["denoiser"]
        _expect(denoiser, Denoiser)
        _expect(denoiser["network"], UNet)
        _expect(denoiser["schedule"], *SCHEDULES)
        _expect(denoiser["prediction"], *PREDICTIONS)
        _require_conditioners(list(conditioners(model).values()))
    described = first_stage_of(model)
    _expect(described, FirstStage)
    _expect(described["encoder"], Encoder)
    _expect(described["decoder"], Decoder)
    _expect(described["regularizer"], KLRegularizer, VQRegularizer)


def _require_conditioners(parts: list[Node]) -> None:
    text = [is_of(part, TextConditioner) for part in parts]
    if text != sorted(text, reverse=True):
        raise UserError("the text encoders have to come before the others in conditioner.conditioners")
    for part in parts:
        if is_of(part, TextConditioner) and part.get("mask"):
            raise UserError(
                "a text conditioner with mask=true has no counterpart: other tools attend to the padding too"
            )
        if not (is_of(part, MaskedImage) and part.get("mask_first", True) and any(text)):
            _expect(part, TextConditioner, MicroConditioner)


def _expect(described: Node, *made_by: Callable[..., Any]) -> None:
    if not is_of(described, *made_by):
        wanted = " or ".join(map(target, made_by))
        raise UserError(f"a {described['_target_']} has no counterpart in other formats; expected {wanted}")


def require_fitting(model: Node, origin: str) -> None:
    """UserError where the UNet's widths are not those of the latents and conditions in the model."""
    network, latent = arguments(model["denoiser"]["network"]), model["first_stage"]["latent_channels"]
    ins, outs = network["in_channels"], network["out_channels"]
    if (ins, outs) != (latent * 2 + 1 if is_masked(model) else latent, latent):
        raise UserError(
            f"the UNet in {origin} takes {ins} channels and gives {outs}, next to a first stage of {latent}: known "
            f"here are {latent}, and {2 * latent + 1} for inpainting (upscalers, depth and editing models take other "
            "pictures)"
        )
    tokens = vector = 0
    for text in texts(model).values():
        width = text["encoder"]["hidden_size"]
        projection = text.get("projection")
        tokens += width
        vector += (projection["projection_dim"] if projection else width) if text.get("pooled") else 0
    vector += sum(len(part["default"]) * part["channels"] for part in numbers(model))
    for what, conditions, width in (
        ("tokens of width", tokens, network["context_dim"]),
        ("a vector of width", vector, network["vector_dim"]),
    ):
        if conditions != (width or 0):
            raise UserError(
                f"the UNet in {origin} takes {what} {width or 0}, its conditions give {conditions}: "
                "they are not of one model, or of a kind that is not known here"
            )
