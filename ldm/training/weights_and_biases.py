"""Weights & Biases as a guest: where it is missing or fails, training goes on without it."""

import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

log = logging.getLogger(__name__)


class WeightsAndBiases(Logger):
    """Lightning's WandbLogger behind a guard: its first error is reported once, and it is not asked again.

    wandb starts at the first logging and ends with the stage. A resumed stage goes on in the same wandb run,
    whose id is kept in `save_dir/wandb_run_id`. WANDB_MODE=offline keeps everything on this machine.
    """

    def __init__(self, save_dir: str | Path, project: str = "ldm", name: str | None = None, **options: Any) -> None:
        """`options` are those of Lightning's WandbLogger and of wandb.init (entity, group, tags, ...)."""
        super().__init__()
        self.folder = Path(save_dir)
        self.options = {"project": project, "name": name} | options
        self.failed = False
        self._parameters: dict[str, Any] = {}
        self._logger: WandbLogger | None = None

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str | None:
        return None

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keeps the configuration for wandb's start."""
        self._parameters |= params

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs at the number of steps done; Lightning counts a step after it has logged it."""
        done = None if step is None else step + 1
        self._ask(lambda logger: logger.log_metrics(metrics, done))

    @rank_zero_only
    def log_image(self, key: str, images: list[str], step: int) -> None:
        """Logs picture files that were made after `step` steps."""
        self._ask(lambda logger: logger.log_image(key, images, step))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the wandb run, so that the next stage has one of its own."""
        if self._logger is not None:
            self._ask(lambda logger: logger.experiment.finish(0 if status == "success" else 1))
            self._logger = None

    def _ask(self, request: Callable[[WandbLogger], object]) -> None:
        if self.failed:
            return
        try:
            if self._logger is None:
                self._logger = self._start()
            request(self._logger)
        except Exception as error:  # of whatever kind: no network, no key, no package, a full disk
            self.failed = True
            reason = str(error).strip().split("\n")[0]
            log.warning("wandb failed (%s: %s); training goes on without it", type(error).__name__, reason)

    def _start(self) -> WandbLogger:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / "wandb_run_id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(4) + "\n")
        logger = WandbLogger(save_dir=str(self.folder), id=kept.read_text().strip(), **self.options)
        logger.log_hyperparams(self._parameters)
        return logger
