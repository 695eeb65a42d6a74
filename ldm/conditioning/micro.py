"""Numbers about a picture (its size, its crop, a score) as Fourier features, SDXL's micro-conditioning."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning.condition import Arguments, Condition, Widths
from ldm.conditioning.text import Conditioner, Fields
from ldm.errors import UserError
from ldm.networks.blocks import sinusoidal_embedding


class MicroConditioner(Conditioner):
    """`vector` [B, channels x numbers]: the sinusoidal embedding of each number, side by side.

    field     the batch's field with the numbers: a tensor [B, N], or B texts such as "1024 1024". In training
              there are original_size and target_size (height, width) and crop (top, left), in pixels
    default   the N numbers where the batch has no such field, or where a text of it is empty
    empty     the N numbers of the empty condition; None: the default
    channels  features per number

    Source: Podell et al. 2023 (SDXL), section 2.2; the embedding is the one of time, as in their code.
    """

    weight: Tensor

    def __init__(
        self, field: str, default: Sequence[float], empty: Sequence[float] | None = None, channels: int = 256
    ) -> None:
        super().__init__()
        self.field = field
        self.default = [float(number) for number in default]
        self.empty_numbers = self.default if empty is None else [float(number) for number in empty]
        self.channels = channels
        if not self.default or len(self.empty_numbers) != len(self.default):
            raise UserError(f"default={list(default)}, empty={empty}: give as many numbers for both, one or more")
        self.register_buffer("weight", torch.zeros(()), persistent=False)  # where the module is, and its type

    def widths(self, latent_channels: int) -> Widths:
        """The features of all numbers."""
        return Widths(vector=self.channels * len(self.default))

    @classmethod
    def planned(cls, arguments: Arguments, latent_channels: int) -> Widths:
        """The same."""
        return Widths(vector=int(arguments.get("channels", 256)) * len(arguments["default"]))

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The numbers' condition, see Conditioner.forward; nothing is dropped."""
        given = fields.get(self.field)
        if given is None:
            n = len(next(iter(fields.values()), ()))
            return self._embedded(torch.tensor([self.default] * n))
        if isinstance(given, Tensor):
            return self._embedded(given.view(len(given), -1))
        return self._embedded(torch.tensor([self._numbers(text) for text in given]))

    def empty(self, n: int) -> Condition:
        """The empty condition's numbers, n times."""
        return self._embedded(torch.tensor([self.empty_numbers] * n))

    def _numbers(self, text: str) -> list[float]:
        if not text.strip():
            return self.empty_numbers
        try:
            return [float(part) for part in text.replace(",", " ").split()]
        except ValueError as error:
            raise UserError(f"{self.field}={text!r}: expected {len(self.default)} numbers") from error

    def _embedded(self, numbers: Tensor) -> Condition:
        """The condition of numbers [B, N]."""
        if numbers.shape[1] != len(self.default):
            raise UserError(f"{self.field} has {numbers.shape[1]} numbers; expected {len(self.default)}")
        rows = sinusoidal_embedding(numbers.to(self.weight.device).reshape(-1), self.channels)
        return Condition(vector=rows.view(len(numbers), -1).to(self.weight.dtype))
