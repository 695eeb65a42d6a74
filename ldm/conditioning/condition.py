"""What a network is conditioned on, as tensors of one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.errors import UserError

Arguments = Mapping[str, Any]
"""The arguments of a constructor, by name, as they stand in a configuration: other objects are configurations too."""


class Widths(NamedTuple):
    """How wide a Condition's fields are: D, V and C; 0 where it has no such field."""

    tokens: int = 0
    vector: int = 0
    concat: int = 0


@dataclass(frozen=True)
class Condition:
    """The inputs of a network that tell it what to draw; a field that is None is not used.

    Row i of every field belongs to sample i, so a batch of conditions is cut, joined and mixed by rows.
    """

    tokens: Tensor | None = None  # [B, L, D], attended by cross-attention
    mask: Tensor | None = None  # [B, L] bool, True where a token may be attended; None: all of them
    vector: Tensor | None = None  # [B, V], added to the time embedding
    concat: Tensor | None = None  # [B, C, h, w], stacked on the noisy latent's channels

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.inputs().items()}
        if len(set(sizes.values())) > 1:
            raise UserError(f"a condition's fields must have one batch size, got {sizes}")

    def __len__(self) -> int:
        """The batch size B; 0 where no field is present."""
        return next((len(value) for value in self.inputs().values()), 0)

    def inputs(self) -> dict[str, Tensor]:
        """The fields that are present, by name: keyword arguments of `UNet.forward`."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """The same condition on `device`; the floating-point fields in `dtype`, the mask stays bool."""
        return self._map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def select(self, indices: Tensor) -> Condition:
        """The rows at `indices` [N] int64, in that order; a row may be taken more than once."""
        return self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def where(self, drop: Tensor, other: Condition) -> Condition:
        """This condition with the rows where `drop` [B] bool is True taken from `other` (B or 1 rows).

        Raises UserError where the two do not have the same fields.
        """
        _require_same_fields([self, other])
        theirs = other.inputs()
        mixed = {}
        for name, mine in self.inputs().items():
            rows = drop.to(mine.device).view(-1, *[1] * (mine.ndim - 1))
            mixed[name] = torch.where(rows, theirs[name], mine)
        return Condition(**mixed)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """The rows of all `conditions`, one after the other (guidance runs two conditions in one pass).

        Raises UserError where they do not have the same fields.
        """
        _require_same_fields(conditions)
        parts = [condition.inputs() for condition in conditions]
        return Condition(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def _map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(**{name: change(value) for name, value in self.inputs().items()})


def _require_same_fields(conditions: Sequence[Condition]) -> None:
    if not conditions:
        raise UserError("no condition given: at least one is needed")
    present = [list(condition.inputs()) for condition in conditions]
    odd = sorted(set().union(*present) - set(present[0]).intersection(*present))
    if odd:
        raise UserError(
            f"conditions with different fields cannot be joined: {', '.join(odd)} in some but not in all "
            f"(given: {'; '.join(', '.join(names) or 'nothing' for names in present)}); "
            "make all of them with one conditioner"
        )
