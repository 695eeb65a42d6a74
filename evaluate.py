"""Measures a model: python evaluate.py checkpoint=RUN_OR_FOLDER out=DIR; see docs/sample.md."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.checkpoint import write_atomic
from ldm.config.build import (
    Trained,
    evaluation_sets,
    load_trained,
    measures,
    pick_device,
    sampling_settings,
    trained_size,
    warn_without_dropout,
)
from ldm.config.command import command
from ldm.errors import UserError
from ldm.evaluation.evaluate import Evaluation
from ldm.evaluation.grids import draw_examples
from ldm.evaluation.protocol import Protocol
from ldm.evaluation.report import plot_curves, plot_scales, rows_table, stages_table
from ldm.generation import Generator
from ldm.interop.model_folder import stage_records


@command("evaluate", ("negative_prompt",))
def main(cfg: DictConfig) -> None:
    """Writes sealed results, one table and one plot against the guidance scale into `out`."""
    given = cfg.guidance_scale
    scales = [float(scale) for scale in (given if isinstance(given, ListConfig) else [given])]
    trained = load_trained(cfg.checkpoint, cfg.weights, cfg.device)
    warn_without_dropout(trained.config, scales)
    size = trained_size(trained, cfg.size)
    sets = evaluation_sets(trained, cfg.data, size, cfg.n, cfg.feature_cache)
    names = cfg.metrics or trained.config.evaluation.metrics
    measured, missing = measures(names, cfg.metric_options, pick_device(cfg.device))
    if not measured:
        raise UserError(not_measured(missing))
    for name in missing:
        sys.stderr.write(f"{name} cannot be measured, the others go on; why is told at the end\n")
    evaluation = Evaluation(
        Generator(trained.model),
        measured,
        lambda scale: sampling_settings(cfg, scale),
        protocol_of(cfg, trained, size),
        cfg.seed,
        cfg.batch_size,
        cfg.negative_prompt,
    )
    rows = list(evaluation.run(sets, scales))
    out = Path(cfg.out)
    with write_atomic(out / "results.json") as temporary:
        content = [{"set": r.set_name, "source": r.source, **r.result.to_dict()} for r in rows]
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    table = rows_table(rows)
    (out / "table.md").write_text(table)
    plot_scales(rows, out / "guidance.png")
    stages = ""
    if trained.folder.path.name == "model":  # of a run's stage, not copied from there
        run = trained.folder.path.parent.parent
        stages = stages_table(stage_records(run))
        plot_curves(run, out / "curves.png")
    draw_examples(rows, out)
    pictures = "\n".join(str(path) for path in sorted(out.glob("*.png")))
    sys.stdout.write(f"\n{table}\n{stages}\n{out / 'results.json'}\n{pictures}\n")
    if missing:
        raise UserError(not_measured(missing))


def protocol_of(cfg: DictConfig, trained: Trained, size: tuple[int, int]) -> Protocol:
    """What all results of this evaluation have in common."""
    return Protocol(
        task="text_to_image",
        reference=None,
        prompts=None,
        weights=trained.folder.record["fingerprint"],
        ema=cfg.weights == "ema",
        metrics={},
        n_images=cfg.n,
        seed=cfg.seed,
        size=size,
        sampler=json.dumps({k: v for k, v in cfg.sampler.items()}),
        grid=json.dumps({k: v for k, v in cfg.grid.items()}),
        guidance=json.dumps(without_scale(OmegaConf.to_container(cfg.guidance))),
        negative_prompt=cfg.negative_prompt,
    )


def without_scale(guidance: Any) -> Any:
    """A guidance's configuration without the scales, those of the guidances that it wraps as well."""
    if not isinstance(guidance, dict):
        return guidance
    return {name: without_scale(value) for name, value in guidance.items() if name != "scale"}


def not_measured(missing: Mapping[str, str]) -> str:
    """One line for each metric that could not be measured, with the reason."""
    return "\n".join(f"{name} was not measured: {reason}" for name, reason in missing.items())


if __name__ == "__main__":
    main()
