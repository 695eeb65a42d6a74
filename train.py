"""Trains the stages of an experiment: python train.py experiment=NAME [overrides]; see docs/train.md."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ldm.config.build import stages
from ldm.config.command import command
from ldm.config.processes import job_processes
from ldm.training.curriculum import run


@command("train")
def main(cfg: DictConfig) -> None:
    """Runs the curriculum of a composed configuration in Hydra's run folder."""
    hydra = HydraConfig.get()
    with job_processes():
        todo, finished = stages(cfg, list(hydra.overrides.task), Path(hydra.runtime.output_dir))
        run(todo, finished)


if __name__ == "__main__":
    main()
