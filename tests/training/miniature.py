"""The quick start's stages in miniature, for tests."""

from pathlib import Path

from ldm.config.build import stages
from ldm.config.compose import compose
from ldm.training import curriculum


def train(shapes: Path, run: Path, *more: str) -> Path:
    """Runs the stages (all, without `stages=...`); the run's folder."""
    given = [
        "experiment=quickstart",
        "variant=tiny",
        f"data.train.shards={shapes}/train",
        f"data.val.shards={shapes}/val",
        f"run_folder={run}",
        "trainer.enable_progress_bar=false",
        *more,
    ]
    curriculum.run(*stages(compose("train", given), given, run))
    return run
