"""PSNR and SSIM: known values, means over images, sums over batches."""

import pytest
import torch

from ldm.errors import UserError
from ldm.evaluation.reconstruction import ReconstructionQuality, psnr, ssim


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.8


def test_ssim_of_the_same_and_of_two_constants() -> None:
    """For constants a, b it is (2ab + c1) / (a^2 + b^2 + c1) with c1 = 0.01^2 (Wang et al. 2004, eq. 6)."""
    assert ssim(images(2), images(2)).tolist() == pytest.approx([1.0, 1.0])
    a, b = torch.full((1, 3, 16, 16), 0.4), torch.full((1, 3, 16, 16), 0.6)
    assert float(ssim(a, b)) == pytest.approx((2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4), abs=1e-5)


def test_the_mean_is_over_images_and_adds_up_over_batches() -> None:
    target = images(6)
    made = target + torch.tensor([0.01, 0.02, 0.05, 0.1, 0.15, 0.2])[:, None, None, None]
    metric = ReconstructionQuality()
    metric.update(made[:2], target[:2])
    metric.update(made[2:], target[2:])
    values = psnr(made, target)
    assert values[0].item() == pytest.approx(40.0, abs=1e-3)
    found, intervals = metric.compute(), metric.intervals()
    assert float(found["psnr_db"]) == pytest.approx(float(values.mean()), abs=1e-4)
    assert float(found["ssim"]) == pytest.approx(float(ssim(made, target).mean()), abs=1e-5)
    half = 1.96 * float(values.std()) / 6**0.5
    low, high = intervals["psnr_db"]
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    assert low < float(found["psnr_db"]) < high


def test_shapes_are_checked() -> None:
    with pytest.raises(UserError, match="of originals"):
        ReconstructionQuality().update(images(2), images(3))
    with pytest.raises(UserError, match="SSIM needs 11 pixels"):
        ssim(images(1)[..., :8], images(1)[..., :8])
