"""Numbers about a picture (its size, its crop, a score) as Fourier features, SDXL's micro-conditioning."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning.condition import Condition, Widths
from ldm.conditioning.conditioner import Conditioner, Fields
from ldm.errors import UserError
from ldm.networks.blocks import sinusoidal_embedding


class MicroConditioner(Conditioner):
    """`vector` [B, channels x numbers]: the concatenated sinusoidal embeddings of the numbers.

    field     the batch's field with the numbers: a tensor [B, N], or B texts such as "1024 1024". Training batches
              have original_size and target_size (height, width) and crop (top, left), in pixels
    default   the N numbers where the batch does not have the field
    empty     the N numbers of an empty text, which is what guidance steers away from; None: the default
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
            raise UserError(f"default={list(default)}, empty={empty}: give both the same count of numbers, 1 or more")
        self.register_buffer("weight", torch.zeros(()), persistent=False)  # follows the module's device and dtype

    def widths(self, latent_channels: int) -> Widths:
        """The features of all numbers."""
        return Widths(vector=self.channels * len(self.default))

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The numbers' condition, see Conditioner.forward; nothing is dropped."""
        values = fields.get(self.field)
        if values is None:
            numbers = torch.tensor([self.default] * len(next(iter(fields.values()), ())))
        elif isinstance(values, Tensor):
            numbers = values.view(len(values), -1)
        else:
            numbers = torch.tensor([self._numbers(text) for text in values])
        if numbers.shape[1] != len(self.default):
            raise UserError(f"{self.field} has {numbers.shape[1]} numbers; expected {len(self.default)}")
        rows = sinusoidal_embedding(numbers.to(self.weight.device).reshape(-1), self.channels)
        return Condition(vector=rows.view(len(numbers), -1).to(self.weight.dtype))

    def _numbers(self, text: str) -> list[float]:
        if not text.strip():
            return self.empty_numbers
        try:
            return [float(part) for part in text.replace(",", " ").split()]
        except ValueError as error:
            raise UserError(f"{self.field}={text!r}: expected {len(self.default)} numbers") from error
