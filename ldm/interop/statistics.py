"""Latent statistics where a format has one scale factor: the rest goes into the 1x1 convolutions, and comes back."""

import base64
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ldm.errors import UserError
from ldm.interop.nodes import STATISTICS

FOLDED = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias")
SD_FACTOR, SDXL_FACTOR = 0.18215, 0.13025  # the scale factors of SD 1 and 2, and of SDXL
KEY = "ldm.unfolded"  # of a safetensors file's metadata


def scale_factor(mean: Tensor, std: Tensor) -> float | None:
    """1 / std where mean is 0 and all std are one number, else None; the shortest number that gives std back."""
    if mean.any() or not bool((std == std[0]).all()):
        return None
    exact = 1.0 / float(std[0])
    short = round(exact, 7)
    return short if is_std_of(std, short) else exact


def is_std_of(std: Tensor, factor: float) -> bool:
    """Whether every std is the float32 number nearest to 1 / factor."""
    return factor > 0 and bool((std == torch.tensor(1.0 / factor, dtype=torch.float32)).all())


def fold_latent_stats(first_stage: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The first stage's tensors with latents that `factor` alone normalises: the same images, the same latents.

    raw' = (raw - mean) / (std factor) is what quant_conv then gives, and post_quant_conv takes. The statistics are
    mean 0 and std 1 / factor. UserError where there are no such convolutions, or a codebook between them.
    """
    if "regularizer.codebook.weight" in first_stage or FOLDED[0] not in first_stage:
        raise UserError(
            "this first stage's latent mean and std are not one scale factor, and with a codebook, or without "
            "quant_conv, they cannot be put into its weights; this format has room for one scale factor alone"
        )
    mean, std = (first_stage[name].to(torch.float64) for name in STATISTICS)
    spread = std * factor
    weight, bias, post_weight, post_bias = (first_stage[name].to(torch.float64) for name in FOLDED)
    means, log_vars = weight.chunk(2)
    mean_bias, log_var_bias = bias.chunk(2)
    new = {
        FOLDED[0]: torch.cat([means / spread[:, None, None, None], log_vars]),
        FOLDED[1]: torch.cat([(mean_bias - mean) / spread, log_var_bias - 2.0 * spread.log()]),
        FOLDED[2]: post_weight * spread[None, :, None, None],
        FOLDED[3]: post_bias + post_weight[:, :, 0, 0] @ mean,
    }
    changed = {name: tensor.to(first_stage[name].dtype) for name, tensor in new.items()}
    plain = {"latent_mean": torch.zeros_like(mean).float(), "latent_std": torch.full_like(std, 1.0 / factor).float()}
    return {**first_stage, **changed, **plain}


def stats_metadata(first_stage: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata from which `unfold_latent_stats` restores what `fold_latent_stats` changed."""
    before = {name: first_stage[name].contiguous() for name in (*FOLDED, *STATISTICS)}
    return {KEY: base64.b64encode(safetensors.torch.save(before)).decode()}


def unfold_latent_stats(
    first_stage: Mapping[str, Tensor], metadata: Mapping[str, str], factor: float
) -> dict[str, Tensor]:
    """The first stage before `fold_latent_stats`, where the metadata has it and the weights are still those."""
    if KEY not in metadata:
        return dict(first_stage)
    try:
        stored = safetensors.torch.load(base64.b64decode(metadata[KEY]))
        before = {**first_stage, **{name: stored[name] for name in (*FOLDED, *STATISTICS)}}
        refolded = fold_latent_stats(before, factor)
        same = all(torch.equal(refolded[name], first_stage[name]) for name in FOLDED)
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the metadata {KEY!r} of the first stage are damaged ({error!r}); copy the file again"
        ) from error
    return before if same else dict(first_stage)  # trained since by another tool: its own statistics count
