"""Launches in miniature: what a stage begins with."""

from pathlib import Path
from typing import cast

from ldm.commands.cache_latents import use_latents
from ldm.config.build import stages
from ldm.config.compose import compose
from ldm.latent_diffusion import LatentDiffusion


def overrides_for(shapes: Path, out: Path, *more: str) -> list[str]:
    return [
        "experiment=quickstart",
        "variant=tiny",
        f"data.train.shards={shapes}/train",
        f"data.val.shards={shapes}/val",
        f"run_folder={out}",
        "callbacks.progress=null",
        *more,
    ]


def model_of(shapes: Path, run: Path, out: Path, *more: str) -> LatentDiffusion:
    """The model that a launch of `base` begins with."""
    given = overrides_for(shapes, out, "stages=[base]", f"tokenizer_path={run}/tokenizer", *more)
    (stage,), models = stages(compose("train", given), given, out, use_latents)
    return cast(LatentDiffusion, stage.build(models).module.export_module)
