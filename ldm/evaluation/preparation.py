"""How pictures are prepared for a network of transformers: its image processor, without Pillow in between."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MODES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, in which image processors are written


@dataclass(frozen=True)
class Preparation:
    """Resize with antialias, centre crop, scale to [0, 1], normalise.

    resize   the shorter side's length, or (H, W) exactly; in pixels
    crop     (H, W) of the centre crop; what the network gets
    mean     of each channel, in [0, 1]
    std      of each channel
    mode     "bicubic" or "bilinear"
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"

    @classmethod
    def from_processor(cls, processor: Mapping[str, Any], source: str) -> Self:
        """What `preprocessor_config.json` says; UserError where it lacks something or asks for another resize."""
        try:
            size, mode = processor["size"], MODES[processor["resample"]]
            resize = size.get("shortest_edge") if isinstance(size, Mapping) else size
            if resize is None:
                resize = (int(size["height"]), int(size["width"]))
            exact = (resize, resize) if isinstance(resize, int) else resize
            crop = exact
            if processor.get("do_center_crop", False):
                given = processor["crop_size"]
                crop = (given["height"], given["width"]) if isinstance(given, Mapping) else (given, given)
            if isinstance(resize, int) and not processor.get("do_center_crop", False):
                raise KeyError("crop_size")
            return cls(resize, crop, tuple(processor["image_mean"]), tuple(processor["image_std"]), mode)
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"the image processor of {source} cannot be followed ({type(error).__name__}: {error}): its "
                "preprocessor_config.json has to give size, resample (2 or 3), image_mean and image_std, and "
                "crop_size where it gives the shortest edge"
            ) from error

    def __post_init__(self) -> None:
        low = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if self.crop[0] > low[0] or self.crop[1] > low[1]:
            raise UserError(f"a crop of {self.crop} does not fit into pictures resized to {self.resize}")

    def __str__(self) -> str:
        side = self.resize if isinstance(self.resize, int) else "x".join(str(length) for length in self.resize)
        return f"{self.mode} antialias to {side}, centre crop {self.crop[0]}x{self.crop[1]}"

    def __call__(self, pixels: Tensor) -> Tensor:
        """The network's input [B, 3, *crop] of pixels [B, 3, H, W] in 0 .. 255, rounded to whole levels."""
        height, width = pixels.shape[-2:]
        resized = self._resized(height, width)
        if resized != (height, width):
            pixels = F.interpolate(pixels, resized, mode=self.mode, antialias=True).round().clamp(0.0, 255.0)
        top, left = (resized[0] - self.crop[0]) // 2, (resized[1] - self.crop[1]) // 2
        pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (self.mean, self.std))
        return (pixels / 255.0 - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            return self.resize
        short = min(height, width)
        return max(self.resize, int(self.resize * height / short)), max(self.resize, int(self.resize * width / short))
