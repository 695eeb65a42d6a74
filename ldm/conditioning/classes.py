"""A class label as one token."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioning.condition import Condition, Widths
from ldm.conditioning.conditioner import Conditioner, Fields, check_probability, dropout_mask, texts
from ldm.errors import UserError, nearest


class ClassConditioner(Conditioner):
    """`tokens` [B, 1, dim]: a trained embedding of the class (Rombach et al. 2022, section 4.3.2).

    num_classes  number of classes; one more embedding stands for "no class", the empty text
    dim          width of the token
    field        the batch's field that holds the class: its number from 0, or its name
    names        the classes' names in order; None: numbers only
    dropout      probability that a sample's class is dropped at a visit, in [0, 1]
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
        check_probability("dropout", dropout)
        self.num_classes = num_classes
        self.field = field
        self.dropout = dropout
        self.numbers = {name: number for number, name in enumerate(names or [])}
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def widths(self, latent_channels: int) -> Widths:
        """The width of the token."""
        return Widths(tokens=self.embedding.embedding_dim)

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The classes' condition, see Conditioner.forward; UserError where the field or a class is unknown."""
        device = self.embedding.weight.device
        classes = torch.tensor([self._number(text) for text in texts(fields, self.field)], dtype=torch.int64)
        classes = classes.to(device)
        if rng_keys is not None and self.dropout > 0:
            drop = dropout_mask(rng_keys, self.field, self.dropout).to(device)
            classes = classes.masked_fill(drop, self.num_classes)
        return Condition(tokens=self.embedding(classes)[:, None])

    def _number(self, text: str) -> int:
        if not text:
            return self.num_classes
        if text in self.numbers:
            return self.numbers[text]
        if not text.isdecimal() or int(text) >= self.num_classes:
            hint = nearest(text, self.numbers) if self.numbers else "the conditioner has no names of classes"
            last = self.num_classes - 1
            raise UserError(f"{self.field}={text!r} is not a class: give a number from 0 to {last} ({hint})")
        return int(text)
