"""How well a first stage keeps a picture."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm.errors import UserError
from ldm.evaluation.interval import Interval, of_mean

NAMES = ("psnr_db", "ssim")
SSIM_WINDOW = 11  # pixels, a Gaussian of sigma 1.5 (Wang et al. 2004)


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B]; both [B, 3, H, W] in [0, 1] (peak 1)."""
    mean_square = (images.float() - target.float()).square().flatten(1).mean(1)
    return -10.0 * torch.log10(mean_square.clamp(min=1e-10))


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image, [B], at most 1; both [B, 3, H, W] in [0, 1] (Wang et al. 2004)."""
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM needs {SSIM_WINDOW} pixels a side, not {list(images.shape[-2:])}")
    # In float32 the variances of flat areas cancel to errors of 2e-4 in the index.
    values = structural_similarity_index_measure(images.double(), target.double(), data_range=1.0, reduction="none")
    return torch.as_tensor(values)


class ReconstructionQuality(Metric):
    """PSNR in dB and SSIM, each the mean over images of the image's own value.

    The state adds up over batches and processes. A perfect image counts as 100 dB.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, target: Tensor) -> None:
        """Adds reconstructions and originals, both [B, 3, H, W] in [0, 1]."""
        if images.shape != target.shape:
            raise UserError(f"reconstructions {list(images.shape)} of originals {list(target.shape)}")
        values = torch.stack([psnr(images, target), ssim(images, target)]).to(torch.float64)
        self.count += len(images)
        self.total += values.sum(1)
        self.squares += values.square().sum(1)

    def compute(self) -> dict[str, Tensor]:
        """The means, by name."""
        return {name: total / self.count for name, total in zip(NAMES, self.total, strict=True)}

    def intervals(self, confidence: float = 0.95) -> dict[str, Interval]:
        """The confidence intervals of the means; after a distributed run, within `sync_context()`."""
        sums = zip(NAMES, self.total.tolist(), self.squares.tolist(), strict=True)
        count = int(self.count)
        return {name: of_mean(total, squares, count, confidence) for name, total, squares in sums}
