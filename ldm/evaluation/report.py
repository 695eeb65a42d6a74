"""The report of an evaluation: one table, and plots of the samples and of the training."""

import json
from collections.abc import Iterator, Mapping, Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ldm.evaluation.evaluate import Row
from ldm.evaluation.grids import labelled_grid, paired_grid
from ldm.evaluation.protocol import Value, require_comparable

AXES = ("task", "reference", "prompts", "guidance_scale", "steps")
COLOURS = ("#2f6db3", "#d9772b", "#3a9a5b", "#b0413e", "#7a5ea8", "#6b6b6b")
INK, FAINT = "#333333", "#dddddd"
CURVES = ("loss", "reconstruction", "pixel", "perceptual", "psnr")  # that are plotted, train/ and val/ together
METRICS = "metrics.jsonl"  # of a stage: a JSON object on a line, with "step", "time" and what was logged
PAIRS = 16  # of an evaluation's reconstructions
Curve = dict[int, float]  # value at step


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
    columns = _metrics(rows)
    lines = [["set", "n", "of", *columns]]
    for row in rows:
        cells = [_cell(row.result.metrics.get(name)) for name in columns]
        lines.append([row.set_name, str(row.result.protocol.n_images), label(row), *cells])
    return _markdown(lines)


def stages_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One Markdown table of the stages of a run: steps, seconds of training, what was measured."""
    lines = [["stage", "steps", "seconds", "notes"]]
    for record in records:
        notes = f"reconstruction {record['psnr_db']:.1f} dB" if "psnr_db" in record else ""
        lines.append([record["stage"], str(record["step"]), f"{record['train_seconds']:.0f}", notes])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its header first, that is aligned as plain text too."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]]) + "\n"


def _metrics(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.result.metrics))


def _metric_fields(rows: Sequence[Row]) -> list[str]:
    """The protocol fields that describe the metrics of the rows; not every row has the same."""
    return sorted({name for row in rows for name in row.result.protocol.fields() if name.startswith("metrics.")})


def _cell(value: Value | None) -> str:
    """A value with its interval, to four digits or so; a share in per cent."""
    if value is None:
        return ""
    scale, unit = (100.0, " %") if value.unit == "share" else (1.0, "")
    size = abs(value.value)
    digits = 1 if unit else max(1, 4 - len(str(int(size))))
    if 0 < size < 0.1 and not unit:  # a kernel distance: three digits, where there are six places for them
        digits = min(6, 2 - floor(log10(size)))
    text = f"{value.value * scale:.{digits}f}{unit}"
    if value.ci_low is not None and value.ci_high is not None:
        text += f" ({value.ci_low * scale:.{digits}f} to {value.ci_high * scale:.{digits}f})"
    return text


def plot_scales(rows: Sequence[Row], path: Path) -> list[Path]:
    """Write a plot of each metric of the samples against the guidance scale, a line for each set; [path], or [].

    Bands are 95 % intervals; dashed is what the reconstructions of the first stage reach, the best that
    samples can be expected to.
    """
    samples = [row for row in rows if row.source == "samples"]
    metrics, sets = _metrics(samples), list(dict.fromkeys(row.set_name for row in samples))
    if not metrics:
        return []
    figure, panels = _panels(len(metrics), columns=3)
    for panel, name in zip(panels, metrics, strict=True):
        for colour, which in zip(COLOURS * len(sets), sets, strict=False):
            of_set = [row for row in rows if row.set_name == which and name in row.result.metrics]
            _scales(panel, [row for row in of_set if row.source == "samples"], name, colour)
            for row in of_set:
                if row.source == "reconstructions":
                    value = row.result.metrics[name].value
                    panel.axhline(value, color=colour, linewidth=1.0, linestyle="--", label=f"{which}, decoded")
        _dress(panel, name, "guidance scale")
        if any(row.result.metrics[name].unit == "share" for row in samples if name in row.result.metrics):
            panel.set_ylim(-0.03, 1.03)
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    protocol = samples[0].result.protocol
    sampler = str(protocol.sampler).split("ldm.sampling.")[-1].split('"')[0]
    facts = f"{protocol.n_images} images a point, {protocol.steps} steps, {sampler}, seed {protocol.seed}"
    weights = f"weights {protocol.weights[:12]}{', EMA' if protocol.ema else ''}"
    figure.supxlabel(f"{facts}, {weights}", fontsize=8, color=INK)
    figure.savefig(path)
    return [path]


def _scales(panel: Axes, rows: Sequence[Row], name: str, colour: str) -> None:
    """One line of a metric over the guidance scales, its intervals as a band and as bars."""
    ordered = sorted(rows, key=lambda row: row.result.protocol.guidance_scale or 0.0)
    if not ordered:
        return
    scales = [row.result.protocol.guidance_scale or 0.0 for row in ordered]
    values = [row.result.metrics[name] for row in ordered]
    low = [v.value if v.ci_low is None else v.ci_low for v in values]
    high = [v.value if v.ci_high is None else v.ci_high for v in values]
    panel.fill_between(scales, low, high, color=colour, alpha=0.13, linewidth=0)
    panel.vlines(scales, low, high, color=colour, alpha=0.5, linewidth=1.0)
    middle = [value.value for value in values]
    panel.plot(scales, middle, color=colour, linewidth=1.8, marker="o", markersize=4.5, label=ordered[0].set_name)


def plot_curves(run: Path, path: Path) -> list[Path]:
    """Write a plot of the training and validation curves of each stage of a run (metrics.jsonl); [path], or [].

    Long curves are drawn faintly under the mean of their neighbourhood.
    """
    stages = sorted((log.parent for log in run.glob(f"*/{METRICS}")), key=_started)
    wanted = []
    for colour, stage in zip(COLOURS * len(stages), stages, strict=False):
        curves = _curves(stage)
        wanted += [(stage.name, name, curves[name], colour) for name in CURVES if name in curves]
    if not wanted:
        return []
    figure, panels = _panels(len(wanted), columns=3)
    for panel, (stage_name, name, parts, colour) in zip(panels, wanted, strict=True):
        if "train" in parts:
            _curve(panel, parts["train"], colour, "train")
        if "val" in parts:
            _curve(panel, parts["val"], INK, "validation")
        _dress(panel, f"{stage_name}: {'psnr, dB' if name == 'psnr' else name}", "step")
        values = [value for part in parts.values() for value in part.values()]
        if min(values) > 0 and max(values) > 20 * min(values):
            panel.set_yscale("log")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(path)
    return [path]


def _curve(panel: Axes, curve: Curve, colour: str, name: str) -> None:
    steps = sorted(curve)
    values = [curve[step] for step in steps]
    if len(steps) > 50:
        panel.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        panel.plot(steps, _average(values, len(values) // 40), color=colour, linewidth=1.8, label=name)
    else:
        marker = "o" if len(steps) < 20 else ""
        panel.plot(steps, values, color=colour, linewidth=1.6, label=name, marker=marker, markersize=3.5)


def _average(values: Sequence[float], reach: int) -> list[float]:
    """The mean over up to `reach` neighbours on each side, fewer toward the ends, so that it does not lag."""
    averages = []
    for i in range(len(values)):
        side = min(reach, i, len(values) - 1 - i)
        window = values[i - side : i + side + 1]
        averages.append(sum(window) / len(window))
    return averages


def _lines(stage: Path) -> Iterator[dict[str, Any]]:
    """The lines of a stage's metrics; an unfinished last one of a killed run is skipped."""
    for line in (stage / METRICS).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _started(stage: Path) -> float:
    return min((float(line["time"]) for line in _lines(stage)), default=0.0)


def _curves(stage: Path) -> dict[str, dict[str, Curve]]:
    """The curves of a stage by name and part, "train" or "val"; of two values at a step the later counts."""
    found: dict[str, dict[str, Curve]] = {}
    for line in _lines(stage):
        for column, value in line.items():
            part, _, name = column.partition("/")
            if name in CURVES and value is not None:
                found.setdefault(name, {}).setdefault(part, {})[int(line["step"])] = float(value)
    return found


def _panels(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels in rows of `columns` at most."""
    columns = min(columns, count)
    lines = ceil(count / columns)
    figure = Figure(figsize=(4.0 * columns + 0.4, 2.9 * lines + 0.6), dpi=130, layout="constrained")
    panels: list[Axes] = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _dress(panel: Axes, title: str, xlabel: str) -> None:
    """One look for all plots: no box, a faint grid, the title at the left."""
    panel.set_title(title, loc="left", fontsize=11, color=INK)
    panel.set_xlabel(xlabel, fontsize=9, color=INK)
    panel.grid(True, color=FAINT, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.tick_params(which="both", colors=INK, labelsize=8, length=0)
    panel.margins(x=0.04)


def draw_examples(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write `reconstructions_SET.png`, and `samples_SET_gSCALE.png` with captions for each guidance scale."""
    paths = []
    pictures = {row.set_name: row.examples for row in rows if row.source == "pictures"}
    for row in rows:
        if row.source == "reconstructions":
            paths.append(folder / f"reconstructions_{row.set_name}.png")
            paired_grid(pictures[row.set_name][:PAIRS], row.examples[:PAIRS], paths[-1])
        if row.source == "samples":
            paths.append(folder / f"samples_{row.set_name}_g{row.result.protocol.guidance_scale:g}.png")
            labelled_grid(list(row.examples), row.captions, paths[-1])
    return paths
