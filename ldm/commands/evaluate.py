"""The evaluation of a trained model: `python evaluate.py checkpoint=RUN_OR_FOLDER out=DIR`; see docs/evaluate.md."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoint import fingerprint, write_atomic
from ldm.commands.metric_options import build_metrics, not_measured
from ldm.config.command import Invocation, command
from ldm.config.devices import pick_device
from ldm.config.trained import (
    Trained,
    load_trained,
    merge_sampling,
    sampling_settings,
    trained_size,
    warn_without_dropout,
)
from ldm.errors import UserError
from ldm.evaluation.evaluate import Evaluation, ReferenceSet, Row
from ldm.evaluation.protocol import Protocol
from ldm.evaluation.report import draw_examples, plot_curves, plot_scales, rows_table, stages_table
from ldm.generation import Generator
from ldm.interop.model_folder import stage_records
from ldm.versions import write_versions


@command("evaluate", ("negative_prompt",))
def main(cfg: Any, invocation: Invocation) -> None:
    """Write results with their provenance, one table and the plots into `out`; UserError where a metric is missing."""
    require_whole_numbers(cfg, {"n": 2, "seed": 0, "batch_size": 1})
    trained = load_trained(cfg.checkpoint, cfg.weights, cfg.device)
    scales, sampling = sampling_of(cfg, trained)
    warn_without_dropout(trained.config, scales)
    size = trained_size(trained, cfg.size)
    sets = reference_sets(trained.config, cfg, size)
    names = trained.config.evaluation.metrics if cfg.metrics is None else cfg.metrics
    names = [names] if isinstance(names, str) else list(names)
    metrics, missing = build_metrics(names, cfg.metric_options, pick_device(cfg.device))
    if not metrics:
        raise UserError(not_measured(missing) or "metrics: none is named; give metrics=[fid,clip_score] or others")
    for name in missing:
        sys.stderr.write(f"{name} cannot be measured, the others go on; the reason follows at the end\n")
    evaluation = Evaluation(
        Generator(trained.model),
        metrics,
        lambda scale: sampling_settings(sampling | {"guidance_scale": scale}),
        protocol_of(cfg, trained, sampling, size),
        cfg.seed,
        cfg.batch_size,
        cfg.negative_prompt or "",
    )
    write(list(evaluation.run(sets, scales)), trained.folder.path, Path(cfg.out))
    if missing:
        raise UserError(not_measured(missing))


def require_whole_numbers(cfg: Any, least: Mapping[str, int]) -> None:
    """UserError where a knob is not a whole number of at least its limit."""
    for name, limit in least.items():
        if type(cfg[name]) is not int or cfg[name] < limit:
            raise UserError(f"{name}={cfg[name]}: expected a whole number, {limit} or more")


def sampling_of(cfg: Any, trained: Trained) -> tuple[list[float], dict[str, Any]]:
    """The guidance scales, and the sampling settings: the model's own where a knob is null."""
    given = cfg.guidance_scale
    values = [given] if given is None or isinstance(given, int | float | str) else list(given)
    if not values or not all(value is None or type(value) in (int, float) for value in values):
        raise UserError(f"guidance_scale={given}: expected a number or a list of numbers")
    knobs = {name: cfg.get(name) for name in ("sampler", "grid", "guidance", "steps")}
    sampling = merge_sampling(trained.config.get("sampling"), knobs | {"guidance_scale": values[0]})
    scales = [float(sampling["guidance_scale"] if value is None else value) for value in values]
    return list(dict.fromkeys(scales)), sampling


def protocol_of(cfg: Any, trained: Trained, sampling: Mapping[str, Any], size: tuple[int, int]) -> Protocol:
    """What all results of this evaluation have in common."""
    return Protocol(
        task="text_to_image",
        reference=None,
        prompts=None,
        weights=fingerprint(trained.model.state_dict()),
        ema=cfg.weights == "ema" and trained.folder.averaged,
        metrics={},
        n_images=cfg.n,
        seed=cfg.seed,
        size=size,
        sampler=json.dumps(sampling["sampler"]),
        grid=json.dumps(sampling["grid"]),
        guidance=json.dumps(sampling["guidance"]),
        negative_prompt=cfg.negative_prompt or "",
    )


def reference_sets(config: Any, cfg: Any, size: tuple[int, int]) -> list[ReferenceSet]:
    """The sets to evaluate on: one of the model's own by name (`data`), other shards, or all of the model's own.

    A set that is null is left out. UserError where one cannot be read or has fewer than two pictures.
    """
    data, own = cfg.data, {str(name): shards for name, shards in config.evaluation.sets.items() if shards is not None}
    chosen = own if data is None else {data: own[data]} if isinstance(data, str) and data in own else {"data": data}
    hint = f"data= takes shards, or one of the model's evaluation sets: {', '.join(own) or 'it has none'}"
    if not chosen:
        raise UserError(f"data: not given; {hint}")
    sets = []
    for name, shards in chosen.items():
        try:
            sets.append(ReferenceSet(name, shards, size, cfg.n, cfg.feature_cache))
        except UserError as error:
            raise UserError(f"{f'data={data}' if name == 'data' else name}: {error}; {hint}") from error
        if sets[-1].n < 2:
            raise UserError(f"{name}: a distance and an interval need at least 2 pictures, it has {sets[-1].n}")
        if sets[-1].n < cfg.n:
            sys.stderr.write(f"{name}: all of its {sets[-1].n} pictures are used (n={cfg.n})\n")
    return sets


def write(rows: Sequence[Row], model: Path, out: Path) -> None:
    """Write results.json, table.md and the pictures into `out`, and print the tables and the files' names."""
    table = rows_table(rows)
    write_versions(out)
    content = [{"set": row.set_name, "source": row.source, **row.result.to_dict()} for row in rows]
    with write_atomic(out / "results.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    (out / "table.md").write_text(table)
    pictures, stages = plot_scales(rows, out / "guidance.png"), ""
    if model.name == "model":  # of a run's stage, not copied from there
        run = model.parent.parent
        stages = stages_table(stage_records(run))
        pictures += plot_curves(run, out / "curves.png")
    pictures += draw_examples(rows, out)
    files = "\n".join(map(str, [out / "results.json", *pictures]))
    sys.stdout.write(f"\n{table}\n{stages}\n{files}\n")
