"""What a person reads of an evaluation: one table, and a plot against the guidance scale."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ldm.evaluation.evaluate import Row
from ldm.evaluation.protocol import Value, require_comparable

AXES = ("task", "reference", "prompts", "guidance_scale", "steps")


def label(row: Row) -> str:
    """What a row's pictures are: "pictures", "reconstructions", "guidance 4"."""
    scale = row.result.protocol.guidance_scale
    return row.source if scale is None else f"guidance {scale:g}"


def rows_table(rows: Sequence[Row]) -> str:
    """One Markdown table of the rows of an evaluation, a line each; shares in per cent, with 95 % intervals.

    Raises UserError where rows were measured under protocols that differ in more than what the lines say.
    """
    for measured in (True, False):  # the pictures themselves have no distance to themselves
        group = [row for row in rows if (row.source == "pictures") is measured]
        if group:
            require_comparable([row.result for row in group], [*AXES, *_metric_fields(group)])
    columns = list(dict.fromkeys(name for row in rows for name in row.result.metrics))
    lines = [["set", "n", "of", *columns]]
    for row in rows:
        cells = [_cell(row.result.metrics.get(name), name) for name in columns]
        lines.append([row.set_name, str(row.result.protocol.n_images), label(row), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]]) + "\n"


def plot_scales(rows: Sequence[Row], path: Path) -> None:
    """A plot of each metric of the samples against the guidance scale, a line for each set; PNG."""
    samples = [row for row in rows if row.source == "samples"]
    metrics = list(dict.fromkeys(name for row in samples for name in row.result.metrics))
    sets = list(dict.fromkeys(row.set_name for row in samples))
    columns = min(3, len(metrics))
    figure = Figure(figsize=(4.2 * columns, 3.2 * -(-len(metrics) // columns)), layout="constrained")
    for place, name in enumerate(metrics):
        axes = figure.add_subplot(-(-len(metrics) // columns), columns, place + 1)
        for color, which in enumerate(sets):
            found = [row for row in samples if row.set_name == which]
            scales = [float(row.result.protocol.guidance_scale or 0) for row in found]
            values = [row.result.metrics[name] for row in found]
            axes.plot(scales, [v.value for v in values], marker="o", color=f"C{color}", label=which)
            low = [v.value if v.ci_low is None else v.ci_low for v in values]
            high = [v.value if v.ci_high is None else v.ci_high for v in values]
            axes.fill_between(scales, low, high, color=f"C{color}", alpha=0.15)
        axes.set_title(name)
        axes.set_xlabel("guidance scale")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def stages_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One Markdown table of the stages of a run: steps, seconds of training, what was measured."""
    lines = ["| stage | steps | seconds | notes |", "|---|---|---|---|"]
    for record in records:
        notes = f"reconstruction {record['psnr_db']:.1f} dB" if "psnr_db" in record else ""
        lines.append(f"| {record['stage']} | {record['step']} | {record['train_seconds']:.0f} | {notes} |")
    return "\n".join(lines) + "\n"


def plot_curves(run: Path, path: Path) -> None:
    """A plot of the training and validation curves of each stage of a run, read from its CSV logs; PNG.

    An interrupted stage has several logs, which are joined at their steps.
    """
    stages = sorted({log.parents[2] for log in run.glob("*/logs/attempt_*/metrics.csv")}, key=_started)
    if not stages:
        return
    figure = Figure(figsize=(4.2 * len(stages), 3.4), layout="constrained")
    for place, stage in enumerate(stages):
        axes = figure.add_subplot(1, len(stages), place + 1)
        for name, points in _curves(stage).items():
            steps = sorted(points)
            axes.plot(steps, [points[step] for step in steps], label=name, marker="o" if len(steps) < 9 else "")
        axes.set_title(stage.name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
        axes.set_yscale("log")
    figure.savefig(path, dpi=120)


def _started(stage: Path) -> float:
    return min(log.stat().st_mtime for log in stage.glob("logs/attempt_*/metrics.csv"))


def _curves(stage: Path) -> dict[str, dict[int, float]]:
    """The curves that are plotted, by name: value at step; later attempts take the place of earlier ones."""
    curves: dict[str, dict[int, float]] = {}
    for log in sorted(stage.glob("logs/attempt_*/metrics.csv"), key=lambda log: int(log.parent.name.split("_")[1])):
        with log.open(newline="") as file:
            for row in csv.DictReader(file):
                for name in ("train/loss", "train/reconstruction", "val/loss", "val/psnr"):
                    if row.get(name):
                        curves.setdefault(name, {})[int(row["step"])] = float(row[name])
    return curves


def _metric_fields(rows: Sequence[Row]) -> list[str]:
    """The fields in which the measures of the rows are told; a reconstruction has one more than a sample."""
    return sorted({name for row in rows for name in row.result.protocol.fields() if name.startswith("metrics.")})


def _cell(value: Value | None, name: str) -> str:
    if value is None:
        return ""
    share = 0 <= value.value <= 1 and value.ci_high is not None and value.ci_high <= 1
    scale, unit = (100.0, " %") if share else (1.0, "")
    text = f"{value.value * scale:.1f}{unit}"
    if value.ci_low is not None and value.ci_high is not None:
        text += f" ({value.ci_low * scale:.1f} to {value.ci_high * scale:.1f})"
    return text
