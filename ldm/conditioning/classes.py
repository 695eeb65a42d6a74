"""A class label as one token."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioning.condition import Arguments, Condition, Widths
from ldm.conditioning.text import Conditioner, Fields, dropped
from ldm.errors import UserError, nearest


class ClassConditioner(Conditioner):
    """`tokens` [B, 1, dim]: an embedding of the class, which is trained (Rombach et al. 2022, section 4.3.2).

    num_classes  how many classes there are; one more stands for "no class", the empty text
    dim          width of the token
    field        the batch's field that holds the class: its number from 0, or its name
    names        the classes' names, in their order; None: numbers alone
    dropout      probability that a sample's class is left out at a visit, in [0, 1]
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        field: str = "caption",
        names: Sequence[str] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if names is not None and len(names) != num_classes:
            raise UserError(f"names has {len(names)} entries, num_classes={num_classes}")
        if not 0 <= dropout <= 1:
            raise UserError(f"dropout={dropout} is not a probability: give a number from 0 to 1")
        self.num_classes = num_classes
        self.field = field
        self.dropout = dropout
        self.numbers = {name: number for number, name in enumerate(names or [])}
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def widths(self, latent_channels: int) -> Widths:
        """The token's."""
        return Widths(tokens=self.embedding.embedding_dim)

    @classmethod
    def planned(cls, arguments: Arguments, latent_channels: int) -> Widths:
        """The same."""
        return Widths(tokens=int(arguments["dim"]))

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The classes' condition, see Conditioner.forward; UserError where the field or a class is unknown."""
        if self.field not in fields:
            raise UserError(f"the batch has no field {self.field!r} to condition on ({nearest(self.field, fields)})")
        classes = torch.tensor([self._number(str(text)) for text in fields[self.field]], dtype=torch.int64)
        if rng_keys is not None and self.dropout > 0:
            drop = dropped(rng_keys, self.field, self.dropout).to(classes.device)
            classes = classes.masked_fill(drop, self.num_classes)
        return self._embedded(classes)

    def empty(self, n: int) -> Condition:
        """The embedding of "no class", n times."""
        return self._embedded(torch.full((n,), self.num_classes))

    def _number(self, text: str) -> int:
        if not text:
            return self.num_classes
        if text in self.numbers:
            return self.numbers[text]
        if not text.isdecimal() or int(text) >= self.num_classes:
            known = nearest(text, self.numbers) if self.numbers else "no names are given"
            last = self.num_classes - 1
            raise UserError(f"{self.field}={text!r} is no class: give a number from 0 to {last} ({known})")
        return int(text)

    def _embedded(self, classes: Tensor) -> Condition:
        return Condition(tokens=self.embedding(classes.to(self.embedding.weight.device))[:, None])
