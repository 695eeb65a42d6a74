"""InceptionV3 as the Frechet Inception Distance uses it: the 2015 TensorFlow graph and its pool3 features.

It differs from torchvision's network: average pools leave the padding out of the mean, the last block pools
by the maximum, there are 1008 classes, and the input is resized as TensorFlow 1 did. Sources: Szegedy et al.
2016; Heusel et al. 2017 (FID); the weights file `pt_inception-2015-12-05-6726825d.pth`, which pytorch-fid
and torch-fidelity read as well. Modules have the names in that file.
"""

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.frozen import FrozenNetwork, read_weights

BATCH_NORM_EPS = 1e-3
SIZE = 299
DIM = 2048


class Conv(nn.Conv2d):
    """A convolution with its batch norm folded in, then ReLU; "same" padding at stride 1 where `padded`."""

    def __init__(self, ins: int, outs: int, height: int, width: int = 0, stride: int = 1, padded: bool = True) -> None:
        kernel = (height, width or height)
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else 0
        super().__init__(ins, outs, kernel, stride, padding)

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input), inplace=True)


def _mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


class BlockA(nn.Module):
    """35x35: [B, ins, h, w] to [B, 224 + pooled, h, w]."""

    def __init__(self, ins: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(ins, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(ins, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(ins, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(ins, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_mean_pool(x))], 1)


class BlockB(nn.Module):
    """35x35 to 17x17: [B, ins, h, w] to [B, 480 + ins, h', w']."""

    def __init__(self, ins: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(ins, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(ins, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """17x17 with 7x7 convolutions in two factors: [B, 768, h, w] to [B, 768, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, width, 1), Conv(width, width, 1, 7)
        self.branch7x7_3 = Conv(width, 192, 7, 1)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, width, 1), Conv(width, width, 7, 1)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, 1, 7), Conv(width, width, 7, 1)
        self.branch7x7dbl_5 = Conv(width, 192, 1, 7)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean_pool(x))], 1)


class BlockD(nn.Module):
    """17x17 to 8x8: [B, 768, h, w] to [B, 1280, h', w']."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192, 1), Conv(192, 192, 1, 7)
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, 7, 1), Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """8x8 with fans of 1x3 and 3x1: [B, ins, h, w] to [B, 2048, h, w]."""

    def __init__(self, ins: int, max_pool: bool) -> None:
        super().__init__()
        self.pool = _max_pool if max_pool else _mean_pool
        self.branch1x1 = Conv(ins, 320, 1)
        self.branch3x3_1 = Conv(ins, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, 1, 3), Conv(384, 384, 3, 1)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(ins, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, 1, 3), Conv(384, 384, 3, 1)
        self.branch_pool = Conv(ins, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        fans = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        fans += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *fans, self.branch_pool(self.pool(x))], 1)


class InceptionV3(FrozenNetwork):
    """Pool3 features [B, 2048] of images in [-1, 1] of 299 x 299; frozen, in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(128), BlockC(160)
        self.Mixed_6d, self.Mixed_6e = BlockC(160), BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, max_pool=False), BlockE(2048, max_pool=True)
        self.freeze()

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The network with the weights of a file in pytorch-fid's layout; without the classifier."""
        network = cls()
        state = fold_state_dict(read_weights(path))
        missing = sorted(set(network.state_dict()) - set(state))
        if missing:
            raise UserError(
                f"{path} lacks {len(missing)} of FID's Inception weights, e.g. {missing[0]}; give the file "
                "pt_inception-2015-12-05-6726825d.pth of the pytorch-fid releases"
            )
        network.load_state_dict(state)
        return network

    def features(self, x: Tensor) -> list[Tensor]:
        """Four maps, of 64 to 2048 channels, after each resolution, of images [B, 3, H, W] in [-1, 1]."""
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        maps = [F.max_pool2d(h, 3, 2)]
        maps.append(F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(maps[-1])), 3, 2))
        h = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(maps[-1]))))
        maps.append(self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(h)))))
        maps.append(self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(maps[-1]))))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, 2048] of images [B, 3, 299, 299] in [-1, 1]."""
        return self.features(x)[-1].mean((2, 3))


def fold_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict of the file's: each batch norm folded into the convolution before it."""
    folded = {}
    for name in [key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")]:
        scale = state[f"{name}.bn.weight"] * torch.rsqrt(state[f"{name}.bn.running_var"] + BATCH_NORM_EPS)
        folded[f"{name}.weight"] = state[f"{name}.conv.weight"] * scale[:, None, None, None]
        folded[f"{name}.bias"] = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale
    return folded


def resize_tensorflow1(x: Tensor, size: int = SIZE) -> Tensor:
    """Images [B, C, size, size] by TensorFlow 1's bilinear resize: no half-pixel centres, no antialias.

    Output pixel i lies at input coordinate i * in / out; `F.interpolate` says (i + 0.5) * in / out - 0.5.
    """

    def weights(length: int) -> Tensor:  # [size, length]
        place = torch.arange(size, dtype=torch.float64, device=x.device) * (length / size)
        low = place.floor().long()
        share = (place - low).to(x.dtype)[:, None]
        eye = torch.eye(length, dtype=x.dtype, device=x.device)
        return (1 - share) * eye[low] + share * eye[(low + 1).clamp(max=length - 1)]

    return weights(x.shape[-2]) @ x @ weights(x.shape[-1]).T
