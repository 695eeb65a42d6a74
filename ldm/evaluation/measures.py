"""Measures: a metric over pictures and their captions, with its interval and the words for its seal."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ldm.evaluation.alignment import Alignment
from ldm.evaluation.clip_score import CLIPScore
from ldm.evaluation.features import Features
from ldm.evaluation.frechet import FrechetDistance, Statistics, statistics
from ldm.evaluation.interval import wilson
from ldm.evaluation.protocol import Value


class Measure(ABC):
    """One kind of number about a set of pictures: begin, update with batches, read the values."""

    needs_others: bool = False
    """Whether it compares with the reference pictures, so that these have no value themselves."""

    @abstractmethod
    def begin(self, reference: Iterable[Tensor]) -> None:
        """Starts anew, against reference pictures [B, 3, H, W] in [0, 1]; read only by `needs_others`."""

    @abstractmethod
    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """Takes in pictures [B, 3, H, W] in [0, 1] and their captions."""

    @abstractmethod
    def values(self) -> dict[str, Value]:
        """The values by name, with their 95 % intervals."""

    @abstractmethod
    def descriptions(self) -> Mapping[str, str]:
        """What the values depend on (network, weights, resize), by name, for the seal."""


class ShapesAlignment(Measure):
    """The share of pictures of the shapes data set that show what their captions say, read from the pixels."""

    def begin(self, reference: Iterable[Tensor]) -> None:
        self._metric = Alignment()

    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        self._metric.update(images, captions)

    def values(self) -> dict[str, Value]:
        shares, counts = self._metric.compute(), self._metric.n()
        found = {}
        for name, share in shares.items():
            low, high = wilson(round(float(share) * counts[name]), counts[name])
            found[name] = Value(float(share), low, high)
        return found

    def descriptions(self) -> Mapping[str, str]:
        return {"alignment": "ldm.evaluation.shapes_reader"}


class Frechet(Measure):
    """The Frechet distance of a feature network between the pictures and the reference pictures.

    It is called FID where the network is Inception in FID's layout, else by its network's name.
    """

    needs_others = True

    def __init__(self, features: Features) -> None:
        self.features = features
        self._reference: tuple[Iterable[Tensor], Statistics] | None = None

    def begin(self, reference: Iterable[Tensor]) -> None:
        if self._reference is None or self._reference[0] is not reference:
            self._reference = reference, statistics(reference, self.features)
        self._metric = FrechetDistance(self.features, self._reference[1])

    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        self._metric.update(images)

    def values(self) -> dict[str, Value]:
        low, high = self._metric.interval()
        return {self.features.distance_label: Value(float(self._metric.compute()), low, high)}

    def descriptions(self) -> Mapping[str, str]:
        return {self.features.distance_label: self.features.description}


class ClipScore(Measure):
    """CLIP score: 100 times the cosine of a picture and its caption, below 0 taken as 0."""

    def __init__(self, model: str) -> None:
        """`model` is a folder, or a name on the hub, of a transformers CLIP model with its tokenizer."""
        self._metric = CLIPScore.from_pretrained(model)

    def begin(self, reference: Iterable[Tensor]) -> None:
        self._metric.reset()

    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        self._metric.update(images, captions)

    def values(self) -> dict[str, Value]:
        low, high = self._metric.interval()
        return {"clip_score": Value(float(self._metric.compute()), low, high)}

    def descriptions(self) -> Mapping[str, str]:
        return {"clip_score": self._metric.description}
