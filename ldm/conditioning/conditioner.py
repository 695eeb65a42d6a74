"""The interface of a conditioner: the fields of a batch in, a Condition out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from ldm.conditioning.condition import Condition, Widths
from ldm.errors import UserError, nearest
from ldm.randomness import fold, uniform

if TYPE_CHECKING:
    from ldm.conditioning.text import TextConditioner

Fields = Mapping[str, Sequence[str] | Tensor]
"""A batch's samples by field name, B entries each: texts, or numbers and pictures as tensors [B, ...]."""


class LatentEncoder(Protocol):
    """The part of a first stage that conditioners use."""

    factor: int

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents [B, C, H / factor, W / factor] of images [B, 3, H, W] in [-1, 1]."""


class Conditioner(nn.Module, ABC):
    """Turns the fields of a batch into a Condition."""

    sees_mask = False
    """Whether it shows the network the field `mask` and the rest of the picture (inpainting)."""
    needs_image = False
    """Whether it needs the field `image`, which neither cached latents nor a prompt provide."""

    def bind(self, first_stage: LatentEncoder) -> None:
        """Take what is needed of the first stage; nothing by default."""

    def encoders(self) -> "dict[str, TextConditioner]":
        """The frozen text encoders in it, by the name of their precomputed states; none by default."""
        return {}

    @abstractmethod
    def widths(self, latent_channels: int) -> Widths:
        """The widths of its conditions next to latents of `latent_channels` channels."""

    @abstractmethod
    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The condition of B samples from `fields`; an empty text gives the unconditional embedding.

        `rng_keys` [B] int64 are the randomness keys of this visit of the samples. With them (training) the
        conditioner drops what its options say; without them (sampling, evaluation) it is deterministic.
        """

    if TYPE_CHECKING:

        def __call__(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
            """`forward`."""


def texts(fields: Fields, name: str) -> list[str]:
    """The texts [B] of a field; UserError where the batch does not have it."""
    if name not in fields:
        raise UserError(f"the batch has no field {name!r} to condition on ({nearest(name, fields)})")
    return [str(text) for text in fields[name]]


def dropout_mask(rng_keys: Tensor, field: str, probability: float) -> Tensor:
    """True [B] bool where `field` is dropped at this visit, drawn from `rng_keys` [B] int64."""
    return uniform(fold(rng_keys, f"drop:{field}")) < probability


def check_probability(name: str, value: float) -> None:
    """Raise UserError where the option `name` is not a probability."""
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{name}={value} is not a probability: give a number from 0 to 1")
