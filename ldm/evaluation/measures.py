"""Measures: a metric over pictures and their captions, with its interval and the words for its seal."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from ldm.evaluation.clip_score import CLIPScore
from ldm.evaluation.features import Features
from ldm.evaluation.frechet import FrechetDistance, Statistics
from ldm.evaluation.interval import wilson
from ldm.evaluation.kernel import KernelDistance, Points
from ldm.evaluation.protocol import Value
from ldm.examples.alignment import Alignment


class Reference(Protocol):
    """The pictures that others are compared with."""

    def features(self, network: Features) -> Tensor:
        """Their features [N, D] on the CPU, which are extracted once for each network."""


class Batch:
    """Pictures with their captions, and their features: each network sees them once, however many measures ask.

    images     [B, 3, H, W] in [0, 1]
    captions   B of them
    first      the index of the first one in the whole set
    """

    def __init__(self, images: Tensor, captions: Sequence[str], first: int = 0) -> None:
        self.images, self.captions = images, captions
        self.indices = torch.arange(first, first + len(images))
        self._features: dict[str, Tensor] = {}

    def features(self, network: Features) -> Tensor:
        """The features [B, D] of the pictures; networks of one description are the same one."""
        if network.description not in self._features:
            self._features[network.description] = network(self.images)
        return self._features[network.description]


class Measure(ABC):
    """One kind of number about a set of pictures: begin, update with batches, read the values.

    Where processes share the pictures, `values` are of all of them, in each process.
    """

    needs_reference: bool = False
    """Whether it compares with the reference pictures, so that these have no value themselves."""

    def to(self, device: torch.device) -> Self:
        """The same measure with its networks on `device`."""
        return self

    @abstractmethod
    def begin(self, reference: Reference) -> None:
        """Starts anew, against reference pictures; read only by `needs_reference`."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Takes in pictures and their captions."""

    @abstractmethod
    def values(self) -> dict[str, Value]:
        """The values by name, with their 95 % intervals."""

    @abstractmethod
    def descriptions(self) -> Mapping[str, str]:
        """What the values depend on (network, weights, resize), by name, for the seal."""


class ShapesAlignment(Measure):
    """The share of pictures of the shapes data set that show what their captions say, read from the pixels."""

    def begin(self, reference: Reference) -> None:
        self._metric = Alignment()

    def update(self, batch: Batch) -> None:
        self._metric.update(batch.images, batch.captions)

    def values(self) -> dict[str, Value]:
        shares = self._metric.compute()
        with self._metric.sync_context():
            counts = self._metric.n()
        found = {}
        for name, share in shares.items():
            low, high = wilson(round(float(share) * counts[name]), counts[name])
            found[name] = Value(float(share), low, high)
        return found

    def descriptions(self) -> Mapping[str, str]:
        return {"alignment": "ldm.examples.shapes_reader"}


class Distance(Measure):
    """A distance between the pictures and the reference pictures in the eyes of a feature network."""

    needs_reference = True
    _metric: FrechetDistance | KernelDistance

    def __init__(self, features: Features) -> None:
        self.network = features
        self._reference: Reference | None = None

    def to(self, device: torch.device) -> Self:
        self.network.to(device)
        return self

    def begin(self, reference: Reference) -> None:
        if self._reference is not reference:
            self.set_reference(reference.features(self.network).to(self.network.device))
            self._reference = reference
        self.start()

    def values(self) -> dict[str, Value]:
        with self._metric.sync_context():
            value, (low, high) = self._metric.estimate()
        return {self.label: Value(value, low, high)}

    def descriptions(self) -> Mapping[str, str]:
        return {self.label: self.network.description}

    @property
    @abstractmethod
    def label(self) -> str:
        """What the distance is called."""

    @abstractmethod
    def set_reference(self, features: Tensor) -> None:
        """Keeps what is needed of the reference's features [N, D]."""

    @abstractmethod
    def start(self) -> None:
        """Makes a fresh metric against that."""


class Frechet(Distance):
    """The Frechet distance of a feature network: FID where it is FID's Inception, else named by its network."""

    _metric: FrechetDistance

    @property
    def label(self) -> str:
        return self.network.frechet_label

    def set_reference(self, features: Tensor) -> None:
        self._statistics = Statistics.of(features)

    def start(self) -> None:
        self._metric = FrechetDistance(self._statistics)

    def update(self, batch: Batch) -> None:
        features = batch.features(self.network)
        self._metric.to(features.device).update(features, batch.indices)


class Kernel(Distance):
    """The kernel distance of a feature network: KID where it is FID's Inception, else named by its network."""

    _metric: KernelDistance

    @property
    def label(self) -> str:
        return self.network.kernel_label

    def set_reference(self, features: Tensor) -> None:
        self._points = Points(features)

    def start(self) -> None:
        self._metric = KernelDistance(self._points)

    def update(self, batch: Batch) -> None:
        features = batch.features(self.network)
        self._metric.to(features.device).update(features)


class ClipScore(Measure):
    """CLIP score: 100 times the cosine of a picture and its caption, below 0 taken as 0."""

    def __init__(self, model: str) -> None:
        """`model` is a folder, or a name on the hub, of a transformers CLIP model with its tokenizer."""
        self._metric = CLIPScore.from_pretrained(model)

    def to(self, device: torch.device) -> Self:
        self._metric.to(device)
        return self

    def begin(self, reference: Reference) -> None:
        self._metric.reset()

    def update(self, batch: Batch) -> None:
        self._metric.update(batch.images, batch.captions)

    def values(self) -> dict[str, Value]:
        value = float(self._metric.compute())
        with self._metric.sync_context():
            low, high = self._metric.interval()
        return {"clip_score": Value(value, low, high)}

    def descriptions(self) -> Mapping[str, str]:
        return {"clip_score": self._metric.description}
