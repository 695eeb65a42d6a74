"""What a network is conditioned on, as tensors of one batch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import UserError


class Widths(NamedTuple):
    """The widths D, V and C of a Condition's fields; 0 for a field that is absent."""

    tokens: int = 0
    vector: int = 0
    concat: int = 0


@dataclass(frozen=True)
class Condition:
    """A network's conditioning inputs; a field that is None is absent. Row i of every field belongs to sample i."""

    tokens: Tensor | None = None  # [B, L, D], attended by cross-attention
    mask: Tensor | None = None  # [B, L] bool, True where a token may be attended; None: all of them
    vector: Tensor | None = None  # [B, V], added to the time embedding
    concat: Tensor | None = None  # [B, C, h, w], stacked on the noisy latent's channels

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.inputs().items()}
        if len(set(sizes.values())) > 1:
            raise UserError(f"a condition's fields must have one batch size, got {sizes}")

    def inputs(self) -> dict[str, Tensor]:
        """The fields that are present, by name: keyword arguments of the network."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def to(self, device: torch.device, dtype: torch.dtype) -> Condition:
        """The same condition on `device`; the floating-point fields in `dtype`, the mask stays bool."""
        return Condition(**{
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in self.inputs().items()
        })  # fmt: skip

    def where(self, drop: Tensor, other: Condition) -> Condition:
        """This condition with the rows where `drop` [B] bool is True taken from `other` (B or 1 rows).

        Raises UserError where the two do not have the same fields.
        """
        own, replacement = self.inputs(), other.inputs()
        if own.keys() != replacement.keys():
            raise UserError(
                f"conditions with different fields cannot be mixed: {', '.join(own) or 'none'} and "
                f"{', '.join(replacement) or 'none'}; make both with one conditioner"
            )
        mixed = {}
        for name, value in own.items():
            rows = drop.to(value.device).view(-1, *[1] * (value.ndim - 1))
            mixed[name] = torch.where(rows, replacement[name], value)
        return Condition(**mixed)
