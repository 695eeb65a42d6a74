"""`train.py`: runs the stages of an experiment, and says what was made, where, and what to type next."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from ldm.config.command import Invocation, command

TEXTS = ("data.*where", "curriculum.*where")
"""Knobs whose values are taken literally: filters of the data."""


@command("train", TEXTS)
def main(cfg: Any, invocation: Invocation) -> float | None:
    """Runs the curriculum of a composed configuration in Hydra's run folder; the objective, for a sweeper."""
    # Imported here, so that a misspelled knob is answered before Lightning is loaded.
    from ldm.commands.cache_latents import use_latents
    from ldm.config.build import stages
    from ldm.config.processes import is_first_rank
    from ldm.training.curriculum import run

    planned, finished = stages(cfg, invocation.overrides, invocation.folder, use_latents)
    run(planned, finished)
    if not is_first_rank():
        return None
    value = _objective(planned[-1].folder, cfg.objective, invocation.folder)
    sys.stdout.write(_summary(invocation, [str(name) for name in cfg.curriculum]))
    return value


def _objective(stage: Path, column: str | None, folder: Path) -> float | None:
    """The last value of a column of the last stage, which goes into the folder for the sweep's table.

    Without `objective` the table shows the task's own (`TrainingModule.objective`), or train/loss where that was not
    logged, and a sweeper gets nothing.
    """
    from ldm.interop.model_folder import open_model_folder
    from ldm.training.metrics_file import METRICS, last_value, logged_columns

    logged = logged_columns(stage / METRICS)
    own = open_model_folder(stage / "model").record.get("objective")
    shown = column or next((name for name in (own, "train/loss") if name in logged), None)
    if shown is None:
        return None
    value = last_value(stage / METRICS, shown)
    fact = {"column": shown, "value": value if math.isfinite(value) else None}
    (folder / "objective.json").write_text(json.dumps(fact) + "\n")
    return value if column else None


def _summary(invocation: Invocation, curriculum: list[str]) -> str:
    """The last lines of a launch: each stage's model, and the commands that use the run."""
    from ldm.interop.model_folder import stage_records

    run = invocation.folder
    lines = ["", f"finished: {run}"]
    records = {record["stage"]: record for record in stage_records(run)}
    for name, record in records.items():
        quality = f", reconstruction {record['psnr_db']:.1f} dB" if "psnr_db" in record else ""
        facts = f"step {record['step']}, {record['train_seconds']:.0f} s{quality}"
        lines.append(f"  {name:<12} {run / name / 'model'}  ({facts})")
    if any(record["kind"] == "diffusion" for record in records.values()):
        lines.append(f'sample:    {_command("sample")} checkpoint={run} prompt="..." out={run}/pictures')
        lines.append(f"evaluate:  {_command('evaluate')} checkpoint={run} out={run}/scores")
    rest = [name for name in curriculum if name not in records]
    if rest and any(text.startswith("stages=") for text in invocation.overrides):
        experiment = next((text for text in invocation.overrides if text.startswith("experiment=")), "experiment=NAME")
        lines.append(f"go on:     {_command('train')} {experiment} resume={run} stages=[{','.join(rest)}]")
    return "\n".join(lines) + "\n"


def _command(name: str) -> str:
    """A command as this launch was started: `python sample.py`, or `ldm-sample --config-dir mine/configs`."""
    program = f"python {name}.py" if sys.argv[0].endswith(".py") else f"ldm-{name}"
    folder = re.search(r"(?:^| )(?:--config-dir|-cd)[ =](\S+)", " ".join(sys.argv[1:]))
    return f"{program} --config-dir {folder[1]}" if folder else program
