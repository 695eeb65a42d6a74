"""Trains the stages of an experiment: python train.py experiment=NAME [overrides]; see docs/train.md."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from lightning_fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from ldm.config.build import stages
from ldm.config.command import command
from ldm.config.processes import job_processes
from ldm.training.curriculum import run
from ldm.training.metrics_file import METRICS, last_value


@command("train")
def main(cfg: DictConfig) -> float | None:
    """Runs the curriculum of a composed configuration in Hydra's run folder; the objective, for a sweeper."""
    hydra = HydraConfig.get()
    with job_processes():
        todo, finished = stages(cfg, list(hydra.overrides.task), Path(hydra.runtime.output_dir))
        run(todo, finished)
    if cfg.objective is None or rank_zero_only.rank > 0:
        return None
    return last_value(todo[-1].folder / METRICS, cfg.objective)


if __name__ == "__main__":
    main()
