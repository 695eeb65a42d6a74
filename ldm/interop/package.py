"""A model between formats: its config node, and its weights by our names."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ldm.errors import UserError, listed
from ldm.first_stage.autoencoder import FirstStage
from ldm.interop import nodes
from ldm.interop.names import WeightMapping
from ldm.interop.nodes import STATISTICS, Node

Tokenizer = dict[str, str]
"""A tokenizer's files by name."""


@dataclass
class Package:
    """A model as it travels between formats.

    config            what the model folder's config.yaml has of it: `model`, `sampling`, `data.size`, ...
    state             the weights of the module that config["model"] describes
    tokenizers        one per text encoder in their order, empty for one that is known by its hub name alone; or none
    origin            where it was read
    has_latent_stats  whether its source says what its latents are normalised by; else mean 0 and std 1 are in the state
    averaged          whether its weights are averages that were chosen from two kinds
    notes             what its source does not say and was assumed, a sentence each
    """

    config: Node
    state: dict[str, Tensor]
    tokenizers: list[Tokenizer] = field(default_factory=list)
    origin: str = ""
    has_latent_stats: bool = True
    averaged: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> Node:
        """The model's node."""
        model: Node = self.config["model"]
        return model

    @property
    def kind(self) -> str:
        """What our model folder calls it."""
        return "first_stage" if nodes.is_first_stage(self.model) else "diffusion"

    @property
    def prediction(self) -> str:
        """The name of the class of what its network predicts; "" of a first stage alone."""
        return "" if self.kind == "first_stage" else nodes.class_name(self.model["denoiser"]["prediction"])

    @property
    def first_stage(self) -> "Package":
        """Its first stage alone, whose node has the statistics of the weights."""
        model, state = nodes.first_stage_of(self.model), self.part(nodes.first_stage_prefix(self.model))
        if nodes.is_of(model, FirstStage):
            model = model | {name: state[name].to(torch.float64).tolist() for name in STATISTICS}
        return replace(self, config={"model": model}, state=state, tokenizers=[])

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The weights under a prefix, without it."""
        return part_of(self.state, prefix)

    def with_state(self, state: dict[str, Tensor]) -> "Package":
        """The same model with other weights."""
        return replace(self, state=state)


def require_finite(package: Package) -> None:
    """UserError that names the weights that hold NaN or infinities."""
    wrong = [name for name, t in package.state.items() if t.is_floating_point() and not _is_finite(t)]
    if wrong:
        raise UserError(
            f"the weights in {package.origin} are damaged, there are NaN or infinities in {listed(wrong, ', ')}; "
            "download or train them again"
        )


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor if tensor.element_size() > 1 else tensor.to(torch.float16)  # torch cannot check 8 bits
    return bool(wide.isfinite().all())


# ----------------------------------------------------------------------------------------------- moving tensors


def from_layout(
    tensors: Mapping[str, Tensor], mappings: list[WeightMapping], shapes: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """Our tensors from another layout's; UserError that names what is missing, unexpected or misshapen there.

    A 1x1 convolution may stand for a matrix and the other way about.
    """
    wanted = {mapping.theirs: mapping.of(shapes) for mapping in mappings}
    wrong = [f"missing {name}" for name in wanted if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in wanted]
    for name, tensor in wanted.items():
        if name in tensors and _core(tensors[name]) != _core(tensor):
            wrong.append(f"{name}: {list(tensors[name].shape)} in the file, {list(tensor.shape)} expected")
    if wrong:
        raise UserError(f"the weights in {origin} don't fit: {listed(wrong)}")
    sizes = {name: tensor.shape for name, tensor in shapes.items()}
    state: dict[str, Tensor] = {}
    for mapping in mappings:
        tensor = tensors[mapping.theirs]
        shaped = tensor if mapping.transpose else tensor.reshape(wanted[mapping.theirs].shape)
        state |= mapping.back(shaped, sizes)
    return state


def to_layout(state: Mapping[str, Tensor], mappings: list[WeightMapping]) -> dict[str, Tensor]:
    """Another layout's tensors from ours."""
    return {mapping.theirs: mapping.of(state).contiguous() for mapping in mappings}


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _core(tensor: Tensor) -> tuple[int, ...]:
    """The shape without the two ones of a 1x1 convolution."""
    shape = tuple(tensor.shape)
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
