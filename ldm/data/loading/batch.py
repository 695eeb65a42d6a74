"""A batch for training and validation."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """The samples of one rank's micro-step. B is the micro-batch; moving it moves every tensor."""

    images: Tensor  # [B, 3, H, W] float32 in [-1, 1]; [B, 0, H, W] with precomputed latents
    fields: dict[str, list[str] | Tensor]  # "caption", and its precomputed states, B entries each
    samples: Tensor  # [B] int64, the sample's index in the manifest
    rng_keys: Tensor  # [B] int64, the address (seed, step, position in the global batch) of its noise
    step: int  # the optimizer step that this batch belongs to, from 0
    original_size: Tensor  # [B, 2] int64, height and width of the stored picture
    crop: Tensor  # [B, 2] int64, top and left of the crop in the resized picture
    positions: Tensor  # [B] int64, the sample's position in the global batch
    global_batch: int  # samples of an optimizer step over all ranks; in validation, of the whole set
    moments: Tensor | None = None  # [B, 2, C, h, w] float16, mean and std of the normalised precomputed latents
    bad: Sequence[tuple[int, str]] = ()  # (index, reason) of each sample that had to be replaced
