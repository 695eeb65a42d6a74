"""The metrics of an evaluation: those named, with `metric_options` over their files in configs/metric."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from ldm.config.check import build, check
from ldm.config.compose import load_option, options
from ldm.errors import UserError, nearest
from ldm.evaluation.metric import Metric


def build_metrics(names: Sequence[str], changes: Any, device: torch.device) -> tuple[list[Metric], dict[str, str]]:
    """The metrics of these names (configs/metric), and of those without their weights the reason, by name.

    `changes` are the `metric_options`: by name, what differs from configs/metric where it is not null. UserError for
    unknown names and knobs, and for options of a metric that is not measured.
    """
    known = options("metric")
    for name in (*names, *changes):
        if name not in known:
            knob = "metrics" if name in names else "metric_options"
            raise UserError(f"{knob}: there is no metric {name!r}; {nearest(name, known)}")
    given = {str(name): dict(_leaves(values)) for name, values in changes.items() if values is not None}
    used = [item for name in names for item in given.get(name, {}).items()]
    for name, values in given.items():
        for knob, value in values.items():
            if (knob, value) not in used and value is not None:  # kid's path is fid's: the same knob and value
                measured = ", ".join(names)
                raise UserError(f"metric_options.{name}.{knob} has no effect: {name} is not in metrics=[{measured}]")
    metrics, missing = [], {}
    for name in dict.fromkeys(names):
        node, path = load_option("metric", name), f"metric_options.{name}"
        node.merge_with(_without_nulls(changes.get(name) or {}))
        check(node, path)
        try:
            metrics.append(cast(Metric, build(node, path)).to(device))
        except UserError as error:
            knobs = [f"{path}.{knob}" for knob, _ in _leaves(node) if not knob.endswith("_target_")]
            missing[name] = str(error) + (f" ({', '.join(knobs)})" if knobs else "")
    return metrics, missing


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names and the values of a nested mapping."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _without_nulls(node: Any) -> Any:
    """A nested mapping's entries that are not null, as plain data."""
    if not isinstance(node, Mapping):
        return node
    return {name: _without_nulls(value) for name, value in node.items() if value is not None}


def not_measured(missing: Mapping[str, str]) -> str:
    """One line for each metric that could not be measured, with the reason."""
    return "\n".join(f"{name} was not measured: {reason}" for name, reason in missing.items())
