"""Results for people: a table and plots."""

import csv
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ldm.checkpoint import write_atomic
from ldm.errors import UserError, nearest
from ldm.evaluation.protocol import Result, Value, require_comparable

COLOURS = ("#2f6db3", "#d9772b", "#3a9a5b", "#b0413e", "#7a5ea8", "#6b6b6b")
INK, FAINT = "#333333", "#d8d8d8"


def _cell(value: Value | None) -> str:
    if value is None:
        return "-"
    if value.ci_low is None or value.ci_high is None:
        return f"{value.value:.4g}"
    digits = max(0, min(4, 3 - len(str(int(abs(value.value))))))
    return f"{value.value:.{digits}f} [{value.ci_low:.{digits}f}, {value.ci_high:.{digits}f}]"


def _metric_names(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in result.metrics))


def rows(results: Sequence[Result], axes: Sequence[str] = ("guidance_scale",)) -> list[list[str]]:
    """A table as text, header first: the axes, then each metric with its 95 % interval.

    Raises UserError where the results differ in more than the axes.
    """
    require_comparable(results, axes)
    names = _metric_names(results)
    table = [[*axes, *names]]
    for result in results:
        fields = result.protocol.fields()
        table.append([*(str(fields[axis]) for axis in axes), *(_cell(result.metrics.get(n)) for n in names)])
    return table


def under(result: Result, axes: Sequence[str] = ()) -> str:
    """The protocol in a line, for below a table or plot: what is not None and is no axis."""
    fields = {name: value for name, value in result.protocol.fields().items() if name not in axes}
    told = ["n_images", "size", "sampler", "steps", "guidance_scale", "seed", "ema"]
    parts = [f"{name} {fields[name]}" for name in told if fields.get(name) is not None]
    if "weights" in fields:
        parts.append(f"weights {fields['weights'][:12]}")
    return ", ".join(parts)


def markdown(results: Sequence[Result], axes: Sequence[str] = ("guidance_scale",)) -> str:
    """The table in Markdown, with the protocol and the networks of the metrics below it."""
    header, *body = rows(results, axes)
    lines = [header, ["---"] * len(axes) + ["---:"] * (len(header) - len(axes)), *body]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    networks = [f"- {name}: {what}" for name, what in results[0].protocol.metrics.items()]
    return "\n".join([text, "", f"95 % intervals. {under(results[0], axes)}.", "", *networks]) + "\n"


def terminal(results: Sequence[Result], axes: Sequence[str] = ("guidance_scale",)) -> str:
    """The table in columns of equal width, with the protocol below it."""
    table = rows(results, axes)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", under(results[0], axes)]) + "\n"


def _dress(axes: Axes, title: str, xlabel: str) -> None:
    """One look for all plots: no box, a faint grid, the title at the left."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.margins(x=0.04)


def _save(figure: Figure, path: str | Path) -> None:
    with write_atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _panels(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels in rows of `columns` at most."""
    columns = min(columns, count)
    lines = ceil(count / columns)
    figure = Figure(figsize=(4.0 * columns + 0.4, 3.0 * lines + 0.5), dpi=130, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    panels: list[Axes] = list(grid.flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def plot_metrics(
    results: Sequence[Result], path: str | Path, axis: str = "guidance_scale", metrics: Sequence[str] = ()
) -> None:
    """Writes a PNG of each metric against a numeric field of the protocol, with 95 % intervals as bands.

    Raises UserError where the results differ in more than this field, or the field is no number.
    """
    require_comparable(results, (axis,))
    places = {id(result): result.protocol.fields()[axis] for result in results}
    if not all(isinstance(place, int | float) for place in places.values()):
        raise UserError(f"{axis!r} is no number in all results ({list(places.values())}): use a table")
    ordered = sorted(results, key=lambda result: places[id(result)])
    names = list(metrics) or _metric_names(ordered)
    for name in names:
        if name not in _metric_names(ordered):
            raise UserError(f"no metric {name!r} in the results: {nearest(name, _metric_names(ordered))}")
    figure, panels = _panels(len(names), columns=3)
    for i, (panel, name) in enumerate(zip(panels, names, strict=True)):
        points = [(places[id(r)], r.metrics[name]) for r in ordered if name in r.metrics]
        _curve(panel, points, COLOURS[i % len(COLOURS)])
        _dress(panel, name, axis.replace("_", " "))
    figure.supxlabel(under(ordered[0], (axis,)), fontsize=7, color=INK)
    _save(figure, path)


def _curve(panel: Axes, points: Sequence[tuple[Any, Value]], colour: str) -> None:
    """A line with points, and its intervals as a band."""
    x, y = [place for place, _ in points], [value.value for _, value in points]
    panel.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=4.5)
    bounded = [(p, v.ci_low, v.ci_high) for p, v in points if v.ci_low is not None and v.ci_high is not None]
    if bounded:
        where, low, high = zip(*bounded, strict=True)
        panel.fill_between(where, low, high, color=colour, alpha=0.15, linewidth=0)


def read_metrics(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of each column of a `metrics.csv` of Lightning's CSVLogger."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name not in ("step", "epoch") and text:
                    curves.setdefault(name, []).append((int(row["step"]), float(text)))
    return curves


def _smooth(values: Sequence[float], halflife: float) -> list[float]:
    """Exponential averages of the values so far, unbiased at the start."""
    keep, total, weight, averages = 0.5 ** (1.0 / halflife), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        averages.append(total / weight)
    return averages


def plot_training(
    files: Mapping[str, str | Path | Sequence[str | Path]], path: str | Path, metrics: Sequence[str] = ()
) -> None:
    """Writes a PNG of the training curves of a run, a panel for each stage and metric.

    `files` maps each stage to its `metrics.csv`, or to those of its attempts in order. Curves of more than
    50 points are drawn faintly, with their average over a twentieth of the points on top.
    """
    panels_of = []
    for i, (stage, given) in enumerate(files.items()):
        curves: dict[str, list[tuple[int, float]]] = {}
        for file in [given] if isinstance(given, str | Path) else given:
            for name, pairs in read_metrics(file).items():
                first = pairs[0][0]  # an attempt goes on from a checkpoint: it replaces what came after it
                curves[name] = [pair for pair in curves.get(name, []) if pair[0] < first] + pairs
        chosen = [name for name in (metrics or curves) if name in curves]
        panels_of += [(f"{stage}: {name}", curves[name], COLOURS[i % len(COLOURS)]) for name in chosen]
    if not panels_of:
        raise UserError(f"none of {[str(file) for file in files.values()]} holds any of the metrics")
    figure, panels = _panels(len(panels_of), columns=3)
    for panel, (title, pairs, colour) in zip(panels, panels_of, strict=True):
        _training_curve(panel, pairs, colour)
        _dress(panel, title, "step")
    _save(figure, path)


def _training_curve(panel: Axes, pairs: Sequence[tuple[int, float]], colour: str) -> None:
    steps, values = [step for step, _ in pairs], [value for _, value in pairs]
    long = len(values) > 50
    panel.plot(steps, values, color=colour, linewidth=0.8 if long else 1.8, alpha=0.3 if long else 1.0,
               marker="o" if len(values) < 15 else "", markersize=3.5)  # fmt: skip
    if long:
        panel.plot(steps, _smooth(values, len(values) / 20), color=colour, linewidth=1.8)
    if min(values) > 0 and max(values) > 50 * min(values):
        panel.set_yscale("log")
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
