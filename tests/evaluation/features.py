"""Features that are given as they are, instead of a network's."""

from torch import Tensor, nn

from ldm.evaluation.features import Features


class Given(Features):
    """The "images" [B, D] are their own features."""

    name, resize = "given", "none"

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        return images

    def extract(self, pixels: Tensor) -> Tensor:
        return pixels


class GivenReference:
    """A reference set of features [N, D]."""

    def __init__(self, features: Tensor) -> None:
        self._features = features

    def features(self, network: Features) -> Tensor:
        return self._features
