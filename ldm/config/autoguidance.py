"""Autoguidance from a configuration: the weaker model is a checkpoint."""

from functools import cache

import torch

from ldm.config.trained import load_trained
from ldm.diffusion.denoiser import Cond
from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling.autoguidance import Autoguidance
from ldm.sampling.guidance import Fields, Guidance


def autoguidance(guidance: Guidance, checkpoint: str, weights: str = "ema") -> Autoguidance:
    """Guidance away from the model at `checkpoint` (a run, a stage, a model folder), which is read once."""
    model = _load_weaker(checkpoint, weights)

    def describe(fields: Fields, device: torch.device) -> Cond:
        return model.conditioner.to(device)(fields, None).inputs()

    return Autoguidance(guidance, model.denoiser, describe, model.first_stage)


@cache
def _load_weaker(checkpoint: str, weights: str) -> LatentDiffusion:
    return load_trained(checkpoint, weights, "cpu").model
