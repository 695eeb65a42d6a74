"""What a sweep ends with: a table of its jobs and their objectives."""

import json
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

OBJECTIVE = "objective.json"  # in a job's folder: {"column": "val/loss", "value": 0.1}
TABLE = "sweep.md"


class SweepTable(Callback):
    """Writes `sweep.md` into the sweep's folder and prints it, the best first where all jobs have a value."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Reads what the jobs have left."""
        folder = Path(config.hydra.sweep.dir)
        jobs = sorted(path.parent for path in folder.glob(f"*/{OBJECTIVE}"))
        if not jobs:
            return
        table = _table([(job.name, json.loads((job / OBJECTIVE).read_text())) for job in jobs])
        (folder / TABLE).write_text(table)
        sys.stdout.write(f"\n{table}\n{folder / TABLE}\n")


def _table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown: job, column, value."""
    column = rows[0][1]["column"]
    highest_first = "psnr" in column
    rows = sorted(rows, key=lambda row: _key(row[1]["value"], highest_first))
    values = ((name, "nan" if fact["value"] is None else f"{fact['value']:.6g}") for name, fact in rows)
    lines = [("job", column), *values]
    width = max(len(name) for name, _ in lines)
    head, *body = [f"| {name:<{width}} | {value:>12} |" for name, value in lines]
    return "\n".join([head, f"|{'-' * (width + 2)}|{'-' * 14}|", *body]) + "\n"


def _key(value: float | None, highest_first: bool) -> float:
    return float("inf") if value is None else -value if highest_first else value
