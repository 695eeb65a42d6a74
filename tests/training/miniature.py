"""The quick start in miniature, without a command line."""

from pathlib import Path

from ldm.commands.cache_latents import use_latents
from ldm.config.build import stages
from ldm.config.compose import compose
from ldm.training import curriculum
from ldm.training.curriculum import Stage


def launch(shapes: Path, run: Path, *more: str) -> tuple[list[Stage], dict[str, Path]]:
    """What `curriculum.run` takes: the stages, and the finished ones' models; `more` are overrides."""
    given = [
        "experiment=quickstart",
        "variant=tiny",
        f"data.train.shards={shapes}/train",
        f"data.val.shards={shapes}/val",
        f"run_folder={run}",
        "callbacks.progress=null",
        *more,
    ]
    return stages(compose("train", given), given, run, use_latents)


def train(shapes: Path, run: Path, *more: str) -> Path:
    """Runs the stages (all, without `stages=...`); the run's folder."""
    curriculum.run(*launch(shapes, run, *more))
    return run
