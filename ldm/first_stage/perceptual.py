"""A perceptual distance between images, measured by a frozen network."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.frozen import FrozenNetwork, read_weights

EPS = 1e-10  # under the root of the channels' norm, where all channels may be zero


class PerceptualDistance(nn.Module):
    """The distance [B] between images in the features of a network, summed over its stages.

    At each stage the features are scaled to unit length over the channels, their squared difference is
    weighted and summed over the channels, and averaged over the pixels (Zhang et al. 2018, eq. 1).

    Args:
        network: gives `features(x)`, a list of feature maps of images in [-1, 1].
        weights: one entry per stage, a number or one number per channel; None: all 1.
    """

    def __init__(self, network: FrozenNetwork, weights: Sequence[float | Tensor] | None = None) -> None:
        super().__init__()
        self.network = network
        self.stages = 0 if weights is None else len(weights)
        for i, weight in enumerate(weights or ()):
            value = torch.as_tensor(weight, dtype=torch.float32).reshape(-1, 1, 1)
            if not (value >= 0).all():
                raise UserError(f"the perceptual weight of stage {i} is below 0; give weights of at least 0")
            self.register_buffer(f"weight_{i}", value, persistent=False)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Distances [B], float32, of images and target [B, 3, H, W] in [-1, 1]; gradients reach `images`."""
        with torch.no_grad():
            target_features = self.network.features(target)
        features = self.network.features(images)
        if self.stages not in {0, len(features)}:
            raise UserError(f"{self.stages} perceptual weights for a network of {len(features)} stages")
        total = images.new_zeros(len(images), dtype=torch.float32)
        for i, (a, b) in enumerate(zip(features, target_features, strict=True)):
            weight = self.get_buffer(f"weight_{i}") if self.stages else torch.ones((), device=a.device)
            difference = (_unit(a) - _unit(b)).square() * weight  # [B, C, h, w]
            total = total + difference.sum(1).mean((1, 2))
        return total


def _unit(h: Tensor) -> Tensor:
    """Features of unit length over the channels, in float32; smooth where all channels are zero."""
    h = h.to(torch.float32)
    return h * torch.rsqrt(h.square().sum(1, keepdim=True) + EPS)


def lpips_weights(path: str | Path | None = None) -> list[Tensor]:
    """LPIPS' weights per channel for the five stages of VGG16; by default those in torchmetrics' wheel."""
    if path is None:
        package = find_spec("torchmetrics")
        if package is None or package.origin is None:
            raise UserError("LPIPS' weights come with torchmetrics; run: pip install torchmetrics, or give a path")
        path = Path(package.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    state = read_weights(path)
    return [state[f"lin{i}.model.1.weight"].flatten() for i in range(5)]
