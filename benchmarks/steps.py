"""Each sampler's text alignment and Frechet distance against its steps, on a trained model.

    python -m benchmarks.steps checkpoint=outputs/quickstart data=validation out=benchmarks/results/steps

One model load, and evaluate.py's own metrics, on the same captions and seeds for every point. Each point is a
result with provenance in `out/points/`, made once: an interrupted run resumes where it stopped, and a run with more
samplers or steps adds its own. `out` gets `steps.png` and `steps.md`. All of evaluate.py's knobs may be given, and two
more, `--samplers` and `--steps`.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from omegaconf import DictConfig

from ldm.commands.evaluate import protocol_of, reference_sets, sampling_of
from ldm.commands.metric_options import build_metrics
from ldm.config.compose import CONFIGS, compose
from ldm.config.devices import pick_device
from ldm.config.trained import load_trained, sampling_settings, trained_size
from ldm.evaluation.evaluate import Evaluation
from ldm.evaluation.protocol import Result, Value, require_comparable
from ldm.generation import Generator

SAMPLERS = sorted(path.stem for path in (CONFIGS / "sampler").glob("*.yaml"))
STEPS = (5, 10, 20, 50, 100)
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde")  # dashed
SHARE = "all"  # the metric of alignment that is plotted: everything of the caption is right

Points = Mapping[tuple[str, int], Result]


def config_of(overrides: Sequence[str], sampler: str, steps: int) -> DictConfig:
    """evaluate.py's configuration of a point: trailing times and guidance 2, unless the overrides say otherwise."""
    return compose(
        "evaluate", ["grid=trailing", "guidance_scale=2", *overrides, f"sampler={sampler}", f"steps={steps}"]
    )


def path_of(out: Path, sampler: str, steps: int) -> Path:
    return out / "points" / f"{sampler}_{steps}.json"


def measured(overrides: Sequence[str], wanted: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, Result]]:
    """The results of the points that are wanted, one after the other; the model is loaded once."""
    cfg = config_of(overrides, *wanted[0])
    trained = load_trained(cfg.checkpoint, cfg.weights, cfg.device)
    size = trained_size(trained, cfg.size)
    (reference,) = reference_sets(trained.config, cfg, size)
    names = cfg.metrics or trained.config.evaluation.metrics
    metrics, _ = build_metrics(names, cfg.metric_options, pick_device(cfg.device))
    generator = Generator(trained.model)
    for sampler, steps in wanted:
        cfg = config_of(overrides, sampler, steps)
        (scale,), sampling = sampling_of(cfg, trained)
        evaluation = Evaluation(
            generator,
            metrics,
            lambda scale, sampling=sampling: sampling_settings(sampling | {"guidance_scale": scale}),  # type: ignore[misc]
            protocol_of(cfg, trained, sampling, size),
            cfg.seed,
            cfg.batch_size,
            cfg.negative_prompt or "",
        )
        yield sampler, steps, evaluation.samples(reference, scale).result


def told(value: Value, percent: bool) -> str:
    """A value with its interval."""
    parts = [value.value, value.ci_low, value.ci_high]
    middle, low, high = (f"{part:.0%}" if percent else f"{part:.0f}" for part in parts if part is not None)
    return f"{middle} ({low} to {high})"


def distance_of(result: Result) -> str:
    """The name of the result's Frechet distance."""
    return next(name for name in result.metrics if name.startswith("Frechet"))


def table(points: Points, steps: Sequence[int]) -> str:
    """One Markdown table for each metric: a line for each sampler, a column for each number of steps."""
    first = next(iter(points.values()))
    lines = []
    for name, percent in ((SHARE, True), (distance_of(first), False)):
        lines += [f"| {name} | " + " | ".join(f"{n} steps" for n in steps) + " |", "|---" * (len(steps) + 1) + "|"]
        for sampler in dict.fromkeys(sampler for sampler, _ in points):
            cells = [told(points[sampler, n].metrics[name], percent) if (sampler, n) in points else "" for n in steps]
            lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(points: Points, path: Path) -> None:
    """Both metrics against the steps, a line for each sampler."""
    first = next(iter(points.values()))
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    for panel, name in zip(panels, (SHARE, distance_of(first)), strict=True):
        for i, sampler in enumerate(dict.fromkeys(sampler for sampler, _ in points)):
            steps = sorted(n for name, n in points if name == sampler)
            values = [points[sampler, n].metrics[name].value for n in steps]
            style = "--" if sampler in STOCHASTIC else "-"
            panel.plot(steps, values, style, color=f"C{i}", marker="o", markersize=3.5, label=sampler)
        panel.set_xscale("log")
        panel.set_xticks(STEPS, [str(n) for n in STEPS])
        panel.minorticks_off()
        panel.set_xlabel("steps")
        panel.set_title("pictures that show the whole caption" if name == SHARE else name, fontsize=10)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    about = first.protocol
    facts = f"{about.n_images} pictures a point, guidance {about.guidance_scale:g}, seed {about.seed}"
    figure.supxlabel(f"{facts}, weights {about.weights[:12]}", fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="evaluate.py's knobs: checkpoint=, data=, out=, n=, ...")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--steps", default=",".join(map(str, STEPS)))
    given = parser.parse_args()
    samplers, steps = given.samplers.split(","), [int(n) for n in given.steps.split(",")]
    everything = [(sampler, n) for n in steps for sampler in samplers]  # the cheap ones first
    out = Path(config_of(given.overrides, *everything[0]).out)
    missing = [point for point in everything if not path_of(out, *point).exists()]
    (out / "points").mkdir(parents=True, exist_ok=True)
    if missing:
        for sampler, n, result in measured(given.overrides, missing):
            result.write(path_of(out, sampler, n))
            sys.stdout.write(f"{sampler}, {n} steps: {told(result.metrics[SHARE], True)}\n")
            sys.stdout.flush()
    points = {(s, n): Result.read(path_of(out, s, n)) for s in samplers for n in steps}
    require_comparable(list(points.values()), ["sampler", "steps"])
    (out / "steps.md").write_text(table(points, steps))
    plot(points, out / "steps.png")
    sys.stdout.write(f"{out / 'steps.md'}\n{out / 'steps.png'}\n")


if __name__ == "__main__":
    main()
