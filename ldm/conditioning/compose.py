"""Several conditioners as one, joined along the features; and none at all."""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from ldm.conditioning.condition import Arguments, Condition, Widths
from ldm.conditioning.text import Conditioner, Encode, Fields, TextConditioner
from ldm.errors import UserError


class Compose(Conditioner):
    """The parts' conditions side by side: tokens [B, L, sum D], vector [B, sum V], concat [B, sum C, h, w].

    As SDXL joins its two text encoders (Podell et al. 2023, section 2.1). A token is attended where any
    part attends to it. Parts that read the same field drop it together. Raises UserError for no parts, or
    for parts whose tokens differ in number.
    """

    def __init__(self, conditioners: Sequence[Conditioner]) -> None:
        super().__init__()
        if not conditioners:
            raise UserError("conditioners is empty: give at least one")
        self.conditioners = nn.ModuleList(conditioners)

    @property
    def sees_mask(self) -> bool:  # type: ignore[override]
        """Whether one of the parts does."""
        return any(part.sees_mask for part in cast(Iterable[Conditioner], self.conditioners))

    @property
    def needs_image(self) -> bool:  # type: ignore[override]
        """Whether one of the parts does."""
        return any(part.needs_image for part in cast(Iterable[Conditioner], self.conditioners))

    def bind(self, encode: Encode) -> None:
        """Hands the first stage's `encode` to the parts."""
        for conditioner in self.conditioners:
            conditioner.bind(encode)  # type: ignore[operator]

    def encoders(self) -> dict[str, TextConditioner]:
        """Those of the parts."""
        parts = cast(Iterable[Conditioner], self.conditioners)
        return {name: encoder for part in parts for name, encoder in part.encoders().items()}

    def widths(self, latent_channels: int) -> Widths:
        """The parts' together."""
        parts = cast(Iterable[Conditioner], self.conditioners)
        return Widths(*map(sum, zip(*(part.widths(latent_channels) for part in parts), strict=True)))

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The joined condition, see Conditioner.forward."""
        return _join([conditioner(fields, rng_keys) for conditioner in self.conditioners])

    def empty(self, n: int) -> Condition:
        """The parts' empty conditions, joined."""
        return _join([conditioner.empty(n) for conditioner in self.conditioners])  # type: ignore[operator]


class Unconditional(Conditioner):
    """A condition without any field, for networks that take none."""

    def widths(self, latent_channels: int) -> Widths:
        """None has any."""
        return self.planned({}, latent_channels)

    @classmethod
    def planned(cls, arguments: Arguments, latent_channels: int) -> Widths:
        """The same."""
        return Widths()

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """Nothing, whatever the fields."""
        return Condition()

    def empty(self, n: int) -> Condition:
        """Nothing."""
        return Condition()


def _join(parts: Sequence[Condition]) -> Condition:
    tokens = [part.tokens for part in parts if part.tokens is not None]
    masks = [part.mask for part in parts if part.tokens is not None]
    vectors = [part.vector for part in parts if part.vector is not None]
    concats = [part.concat for part in parts if part.concat is not None]
    if len({part.shape[1] for part in tokens}) > 1:
        raise UserError(
            f"conditioners with different token counts cannot be composed: {[t.shape[1] for t in tokens]}; "
            "give them one max_length"
        )
    present = [mask for mask in masks if mask is not None]
    return Condition(
        tokens=torch.cat(tokens, dim=2) if tokens else None,
        mask=reduce(torch.logical_or, present) if masks and len(present) == len(masks) else None,
        vector=torch.cat(vectors, dim=1) if vectors else None,
        concat=torch.cat(concats, dim=1) if concats else None,
    )
