"""Several conditioners as one, their tokens joined along the features or the sequence; and no conditioner."""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.condition import Condition, Widths
from ldm.conditioning.conditioner import Conditioner, Fields, LatentEncoder
from ldm.conditioning.text import TextConditioner
from ldm.errors import UserError


class Compose(Conditioner):
    """The parts' conditions as one: tokens joined, vector [B, sum V], concat [B, sum C, h, w].

    join          features: tokens [B, L, sum D], as SDXL joins its two text encoders (Podell et al. 2023, section
                  2.1); a token is attended where any part attends to it.
                  sequence: tokens [B, sum L, D], as SD 3 joins CLIP and T5 (Esser et al. 2024, figure 2); a part
                  without a mask is attended everywhere.
    pad_features  with join=sequence: zeros after the features of the narrower parts, up to the widest (SD 3)

    Parts that read the same field drop it together. Raises UserError for parts that do not fit.
    """

    def __init__(
        self,
        conditioners: Sequence[Conditioner],
        join: Literal["features", "sequence"] = "features",
        pad_features: bool = False,
    ) -> None:
        super().__init__()
        if not conditioners:
            raise UserError("conditioners is empty: give at least one")
        if join not in ("features", "sequence"):
            raise UserError(f"join={join}: expected features or sequence")
        if pad_features and join != "sequence":
            raise UserError("pad_features=true has an effect with join=sequence only")
        widths = [part.widths(0).tokens for part in conditioners if part.widths(0).tokens]
        if join == "sequence" and not pad_features and len(set(widths)) > 1:
            raise UserError(
                f"join=sequence needs tokens of one width, the conditioners' are {widths}: give pad_features=true "
                "(zeros after the narrower ones, as in SD 3), or encoders of one width"
            )
        self.conditioners = nn.ModuleList(conditioners)
        self.join = join
        self.pad_features = pad_features

    @property
    def parts(self) -> Iterable[Conditioner]:
        """The conditioners in order."""
        return cast(Iterable[Conditioner], self.conditioners)

    @property
    def sees_mask(self) -> bool:  # type: ignore[override]
        """Whether one of the parts does."""
        return any(part.sees_mask for part in self.parts)

    @property
    def needs_image(self) -> bool:  # type: ignore[override]
        """Whether one of the parts does."""
        return any(part.needs_image for part in self.parts)

    def bind(self, first_stage: LatentEncoder) -> None:
        """Bind the first stage to every part."""
        for part in self.parts:
            part.bind(first_stage)

    def encoders(self) -> dict[str, TextConditioner]:
        """The frozen text encoders of all parts."""
        return {name: encoder for part in self.parts for name, encoder in part.encoders().items()}

    def widths(self, latent_channels: int) -> Widths:
        """The widths of the joined condition."""
        tokens, vectors, concats = zip(*(part.widths(latent_channels) for part in self.parts), strict=True)
        return Widths(max(tokens) if self.join == "sequence" else sum(tokens), sum(vectors), sum(concats))

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The joined condition, see Conditioner.forward."""
        conditions = [part(fields, rng_keys) for part in self.parts]
        vectors = [condition.vector for condition in conditions if condition.vector is not None]
        concats = [condition.concat for condition in conditions if condition.concat is not None]
        tokens = [condition.tokens for condition in conditions if condition.tokens is not None]
        masks = [condition.mask for condition in conditions if condition.tokens is not None]
        join = _along_sequence if self.join == "sequence" else _along_features
        joined, mask = join(tokens, masks) if tokens else (None, None)
        return Condition(
            tokens=joined,
            mask=mask,
            vector=torch.cat(vectors, dim=1) if vectors else None,
            concat=torch.cat(concats, dim=1) if concats else None,
        )


class Unconditional(Conditioner):
    """A condition without fields, for networks that take none."""

    def widths(self, latent_channels: int) -> Widths:
        """All 0."""
        return Widths()

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The condition without fields."""
        return Condition()


def _along_features(tokens: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, L, sum D] and the mask [B, L] of those that any part attends to."""
    if len({part.shape[1] for part in tokens}) > 1:
        raise UserError(
            f"join=features needs as many tokens of each conditioner, they have {[t.shape[1] for t in tokens]}: give "
            "them one max_length, or join=sequence"
        )
    present = [mask for mask in masks if mask is not None]
    mask = reduce(torch.logical_or, present) if len(present) == len(masks) else None
    return torch.cat(list(tokens), dim=2), mask


def _along_sequence(tokens: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, sum L, max D], zeros after the narrower ones, and the masks [B, sum L], None where no part has one."""
    width = max(part.shape[2] for part in tokens)
    joined = torch.cat([F.pad(part, (0, width - part.shape[2])) for part in tokens], dim=1)
    if all(mask is None for mask in masks):
        return joined, None
    filled = [
        part.new_ones(part.shape[:2], dtype=torch.bool) if mask is None else mask
        for part, mask in zip(tokens, masks, strict=True)
    ]
    return joined, torch.cat(filled, dim=1)
