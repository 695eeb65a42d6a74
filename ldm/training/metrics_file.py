"""The metrics file: a JSON object on a line for every logging, always written."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from ldm.checkpoint import write_atomic
from ldm.errors import UserError, nearest

METRICS = "metrics.jsonl"  # in a stage's folder


class MetricsFile(Logger):
    """Appends `{"step": 50, "time": 1700000000.0, "train/loss": 0.1, ...}` to a file, on rank 0.

    `step` is the number of optimizer steps done, as in the checkpoints' names; `time` is in seconds since 1970.
    A number that JSON does not have (NaN, infinity) is null. The file is opened and closed for each line, so a
    killed process loses none.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the composed configuration lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends a line. Lightning counts a step after it has logged it, so `step` is one behind."""
        line: dict[str, Any] = {"step": None if step is None else step + 1, "time": round(time.time(), 3)}
        line |= {name: _number(value) for name, value in metrics.items() if name != "epoch"}  # an epoch is the run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`, and one that is cut off, so that a resumed curve has each step once."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _step(line) <= step]
        if kept != lines:
            with write_atomic(self.path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")


class Rewind(pl.Callback):
    """Rewinds a metrics file to the step that training resumes from."""

    def __init__(self, file: MetricsFile) -> None:
        self.file = file

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.file.rewind(trainer.global_step)


def last_value(path: Path, name: str) -> float:
    """The newest value of a column of a metrics file, NaN where it was not finite.

    Raises UserError where the file has no such column.
    """
    values = [line[name] for line in _lines(path) if name in line]
    if not values:
        raise UserError(f"{name}: {path} has no such column; {nearest(name, logged_columns(path))}")
    return math.nan if values[-1] is None else float(values[-1])


def logged_columns(path: Path) -> list[str]:
    """The columns of a metrics file, in the order of their first appearance."""
    return list(dict.fromkeys(column for line in _lines(path) for column in line))


def _lines(path: Path) -> list[dict[str, Any]]:
    written = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in written if line.endswith("\n")]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _step(line: str) -> float:
    """The step of a line; infinity for one that is cut off."""
    try:
        return float(json.loads(line)["step"] or 0) if line.endswith("\n") else math.inf
    except ValueError:
        return math.inf
