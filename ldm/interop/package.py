"""A model between formats: its architecture as plain values, and its weights by our names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.text import clip_projection, clip_text_from_config
from ldm.errors import UserError, listed
from ldm.first_stage.autoencoder import FirstStage
from ldm.first_stage.regularizer import KLRegularizer, Regularizer, VQRegularizer
from ldm.interop.names import WeightMapping
from ldm.networks.autoencoder import Decoder, Encoder
from ldm.networks.unet import UNet

Tokenizer = dict[str, str]
"""A tokenizer's files by name."""


@dataclass(frozen=True)
class Text:
    """A text encoder and what is taken from it.

    config           keyword arguments of `clip_text_from_config`
    projection_dim   of the pooled state's projection; None: none
    layer, final_norm, pooled, max_length, zero_empty_embedding   as in `TextConditioner`
    prefix           what stands before its names in a transformers file, "text_model." or ""
    """

    config: dict[str, Any]
    projection_dim: int | None = None
    layer: int = -1
    final_norm: bool = True
    pooled: bool = False
    max_length: int = 77
    zero_empty_embedding: bool = False
    prefix: str = "text_model."

    @property
    def vocab(self) -> int:
        """How many tokens it knows."""
        return int(self.config["vocab"])


@dataclass(frozen=True)
class Architecture:
    """What a model is, without its weights.

    first_stage  `encoder` and `decoder` (keyword arguments), `codebook` (entries, channels, or None for KL),
                 `latent_channels`, `quant_conv`
    network      keyword arguments of `UNet`; None: a first stage alone
    texts        its text encoders
    numbers      keyword arguments of its `MicroConditioner`s
    schedule     keyword arguments beta_start, beta_end, steps, and `kind`: the class's name; of a ZeroTerminalSNR
                 `schedule`, the one that it rescales, in the same form
    prediction   the class's name
    size         [height, width] in pixels that it was last trained at
    masked       whether a mask and the masked picture's latents stand beside the latent (Stable Diffusion's inpainting)
    """

    first_stage: dict[str, Any]
    network: dict[str, Any] | None = None
    texts: tuple[Text, ...] = ()
    numbers: tuple[dict[str, Any], ...] = ()
    schedule: dict[str, Any] = field(default_factory=dict)
    prediction: str = "Epsilon"
    size: tuple[int, int] = (512, 512)
    masked: bool = False

    def plain(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self)

    @staticmethod
    def of(plain: Mapping[str, Any]) -> "Architecture":
        """The architecture of `plain()`; UserError where it is not one."""
        try:
            values = dict(plain)
            values["texts"] = tuple(Text(**text) for text in values["texts"])
            values["numbers"] = tuple(values["numbers"])
            height, width = values["size"]
            return Architecture(**(values | {"size": (int(height), int(width))}))
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"the description of the model in the file is not readable ({error})") from error

    def text_prefix(self, i: int) -> str:
        """What stands before text encoder i's names in our state."""
        alone = len(self.texts) == 1 and not self.numbers and not self.masked
        return "conditioner." if alone else f"conditioner.conditioners.{i}."


@dataclass
class Package:
    """A model on its way: architecture, weights by our names, and its tokenizers, one per text encoder.

    latents_told   whether its source says what its latents are normalised by; else mean 0 and std 1 stand there
    averaged       whether its weights are averages that were chosen from two kinds
    notes          what its source does not tell and was assumed, a sentence each
    """

    architecture: Architecture
    state: dict[str, Tensor]
    tokenizers: list[Tokenizer] = field(default_factory=list)
    latents_told: bool = True
    averaged: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What our model folder calls it."""
        return "first_stage" if self.architecture.network is None else "diffusion"

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The weights under a prefix, without it."""
        return part_of(self.state, prefix)

    def with_state(self, state: dict[str, Tensor]) -> "Package":
        """The same model with other weights."""
        return replace(self, state=state)


# ------------------------------------------------------------------------------------------ what fits together


def is_masked(first_stage: Mapping[str, Any], network: Mapping[str, Any]) -> bool:
    """Whether the UNet takes the mask and the masked picture's latents beside the latent."""
    return bool(network["in_channels"] == 2 * first_stage["latent_channels"] + 1)


def require_fitting(architecture: Architecture, origin: str) -> None:
    """UserError where the UNet's widths are not those of the latents and conditions that stand beside it."""
    network = architecture.network
    if network is None:
        return
    latent = architecture.first_stage["latent_channels"]
    ins, outs = network["in_channels"], network["out_channels"]
    if (ins, outs) != (latent * 2 + 1 if architecture.masked else latent, latent):
        raise UserError(
            f"the UNet in {origin} takes {ins} channels and gives {outs}, beside a first stage of {latent}: known here "
            f"are {latent}, and {2 * latent + 1} for inpainting (upscalers, depth and editing models take other "
            "pictures)"
        )
    tokens = sum(text.config["hidden_size"] for text in architecture.texts)
    vector = sum(text.projection_dim or text.config["hidden_size"] for text in architecture.texts if text.pooled)
    vector += sum(len(part["default"]) * part.get("channels", 256) for part in architecture.numbers)
    for what, given, own in (
        ("tokens of width", tokens, network["context_dim"]),
        ("a vector of width", vector, network["vector_dim"]),
    ):
        if given != (own or 0):
            raise UserError(
                f"the UNet in {origin} takes {what} {own or 0}, the conditions beside it give {given}: "
                "they are not of one model, or of a kind that is not known here"
            )


def require_finite(package: Package, origin: str) -> None:
    """UserError that names the weights that hold NaN or infinities."""
    wrong = [name for name, t in package.state.items() if t.is_floating_point() and not _is_finite(t)]
    if wrong:
        raise UserError(
            f"the weights in {origin} are damaged, there are NaN or infinities in {listed(wrong, ', ')}; "
            "download or train them again"
        )


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor if tensor.element_size() > 1 else tensor.to(torch.float16)  # torch does not look into 8 bits
    return bool(wide.isfinite().all())


# ------------------------------------------------------------------------------------------- without memory


def build_first_stage(arguments: Mapping[str, Any]) -> FirstStage:
    """The first stage that `Architecture.first_stage` describes, with random weights."""
    book = arguments["codebook"]
    regularizer: Regularizer = VQRegularizer(**book) if book else KLRegularizer()
    return FirstStage(
        Encoder(**arguments["encoder"]),
        regularizer,
        Decoder(**arguments["decoder"]),
        arguments["latent_channels"],
        arguments["quant_conv"],
    )


def shapes_of_first_stage(architecture: Architecture) -> dict[str, Tensor]:
    """The first stage's tensors by name on the meta device, without its statistics."""
    with torch.device("meta"):
        module = build_first_stage(architecture.first_stage)
    return {name: p.detach() for name, p in module.named_parameters()}


def shapes_of_network(architecture: Architecture) -> dict[str, Tensor]:
    """The UNet's tensors by name on the meta device."""
    with torch.device("meta"):
        module = UNet(**(architecture.network or {}))
    return {name: p.detach() for name, p in module.named_parameters()}


def shapes_of_text(text: Text) -> dict[str, Tensor]:
    """A text encoder's tensors on the meta device: `encoder.*` and, where it has one, `projection.weight`."""
    with torch.device("meta"):
        module = nn.ModuleDict({"encoder": clip_text_from_config(**text.config)})
        if text.projection_dim is not None:
            module["projection"] = clip_projection(text.config["hidden_size"], text.projection_dim)
    return {name: p.detach() for name, p in module.named_parameters()}


# ----------------------------------------------------------------------------------------------- moving tensors


def taken(
    given: Mapping[str, Tensor], pieces: list[WeightMapping], shapes: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """Our tensors, made of another layout's; UserError that names what is missing, unexpected or misshapen there.

    A 1x1 convolution may stand for a matrix and the other way about.
    """
    wanted = {piece.theirs: piece.of(shapes) for piece in pieces}
    wrong = [f"missing {name}" for name in wanted if name not in given]
    wrong += [f"unexpected {name}" for name in given if name not in wanted]
    for name, tensor in wanted.items():
        if name in given and _core(given[name]) != _core(tensor):
            wrong.append(f"{name}: {list(given[name].shape)} in the file, {list(tensor.shape)} expected")
    refuse(wrong, origin)
    sizes = {name: tensor.shape for name, tensor in shapes.items()}
    found: dict[str, Tensor] = {}
    for piece in pieces:
        tensor = given[piece.theirs]
        found |= piece.back(tensor if piece.transpose else tensor.reshape(wanted[piece.theirs].shape), sizes)
    return found


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def made(state: Mapping[str, Tensor], pieces: list[WeightMapping], prefix: str = "") -> dict[str, Tensor]:
    """Another layout's tensors, made of ours."""
    return {prefix + piece.theirs: piece.of(state).contiguous() for piece in pieces}


def refuse(wrong: list[str], origin: str) -> None:
    """UserError that lists what is wrong with the weights, where anything is."""
    if wrong:
        raise UserError(f"the weights in {origin} don't fit: {listed(wrong)}")


def _core(tensor: Tensor) -> tuple[int, ...]:
    """The shape without the two ones of a 1x1 convolution."""
    shape = tuple(tensor.shape)
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def one_or_each(values: list[Any]) -> Any:
    """A value that all have, else the list."""
    return values[0] if all(value == values[0] for value in values) else values
