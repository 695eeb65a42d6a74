"""What every metric is: a torchmetrics.Metric over pictures and captions, with intervals and a description."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torchmetrics
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.features import Features
from ldm.evaluation.protocol import Value


class Reference(Protocol):
    """The pictures that others are compared with."""

    def features(self, network: Features) -> Tensor:
        """Their features [N, D] on the CPU, extracted once for each network."""


@dataclass
class Batch:
    """Pictures with their captions, and their features: each network sees them once, whatever metrics need it.

    images     [B, 3, H, W] in [0, 1]
    captions   B of them
    indices    [B], the pictures' places in the whole set
    """

    images: Tensor
    captions: Sequence[str]
    indices: Tensor
    _features: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.captions) == len(self.indices):
            counts = f"{len(self.images)} pictures but {len(self.captions)} captions and {len(self.indices)} indices"
            raise UserError(f"a batch has a caption and an index for each picture, not {counts}")

    def features(self, network: Features) -> Tensor:
        """The features [B, D] of the pictures; networks of one description are the same one."""
        if network.description not in self._features:
            self._features[network.description] = network(self.images)
        return self._features[network.description]


class Metric(torchmetrics.Metric):
    """One kind of number about a set of pictures: `update` with batches, then `compute` the values.

    Keep sums or features in states (`add_state`): torchmetrics joins them over processes around `compute`, so every
    process gets the values of all processes' pictures.
    """

    is_differentiable = False
    full_state_update = False
    needs_reference: bool = False
    """Whether it compares with reference pictures, so that it has no value for these themselves."""

    def set_reference(self, reference: Reference) -> None:
        """Keep what is needed of the reference pictures, and `reset`; called where `needs_reference` is true."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Add pictures and their captions."""

    @abstractmethod
    def compute(self) -> dict[str, Value]:
        """The values by name, with their 95 % intervals."""

    @abstractmethod
    def descriptions(self) -> Mapping[str, str]:
        """What the values depend on (network, weights, resize), by name, for the provenance record."""
