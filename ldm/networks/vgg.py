"""VGG16's convolutions: the feature network of LPIPS."""

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.frozen import FrozenNetwork, read_weights

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
FEATURE_CHANNELS = tuple(stage[-1] for stage in STAGES)


class VGG16(FrozenNetwork):
    """Features of images in [-1, 1] after the last ReLU of each stage, as LPIPS takes them; frozen.

    The input is shifted and scaled as in LPIPS (ImageNet's mean and std, for images in [-1, 1]).
    Source: Simonyan and Zisserman 2015; Zhang et al. 2018 (LPIPS), `ScalingLayer`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None], False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None], False)
        self.stages = nn.ModuleList()
        width = 3
        for outs in STAGES:
            stage = nn.ModuleList()
            for out in outs:
                stage.append(nn.Conv2d(width, out, 3, padding=1))
                width = out
            self.stages.append(stage)
        self.freeze()

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The network with torchvision's VGG16 weights, from a file; its classifier is skipped."""
        network = cls()
        network.origin = str(path)
        state = read_weights(path)
        indices = sorted({int(k.split(".")[1]) for k in state if k.startswith("features.")})
        ours = [f"stages.{i}.{j}" for i, stage in enumerate(STAGES) for j in range(len(stage))]
        if len(indices) != len(ours):
            raise UserError(f"{path} has {len(indices)} convolutions named features.N; VGG16 has {len(ours)}")
        pairs = list(zip(ours, indices, strict=True))
        network.load_state_dict(
            {f"{a}.{kind}": state[f"features.{b}.{kind}"] for a, b in pairs for kind in ("weight", "bias")}
        )
        return network

    def features(self, x: Tensor) -> list[Tensor]:
        """Five feature maps of images [B, 3, H, W] in [-1, 1]: 64 .. 512 channels at 1/1 .. 1/16."""
        h = (x - self.shift) / self.scale
        outputs: list[Tensor] = []
        for stage in self.stages:
            h = F.max_pool2d(h, 2) if outputs else h
            for conv in stage.children():
                h = F.relu(conv(h))
            outputs.append(h)
        return outputs
