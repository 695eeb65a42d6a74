"""The configuration of one stage of the curriculum."""

from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.compose import is_open, load_option, names
from ldm.config.overrides import parse
from ldm.errors import UserError, nearest


def stage_config(cfg: DictConfig, stage: str, overrides: list[str]) -> DictConfig:
    """The configuration of one stage: the root, then `curriculum.<stage>`, then the command line's own values.

    `task` is the node of what the stage trains: the one that the launch chose for all stages, or the option of
    configs/task that the curriculum names. Raises UserError for a stage, or a knob of it, that does not exist.
    """
    if stage not in cfg.curriculum:
        raise UserError(f"stages: there is no stage {stage!r}; {nearest(stage, [str(s) for s in cfg.curriculum])}")
    root = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))
    difference = root.pop("curriculum")[stage]
    task = _task(root, difference, stage)
    known = set(names(root))
    for name in names(difference):
        parents = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
        inside_target = any(f"{parent}._target_" in known for parent in parents)  # `check` knows better there
        if name not in known and not inside_target and not is_open(name):
            raise UserError(f"curriculum.{stage}.{name}: there is no such knob; {nearest(name, known)}")
    merged = cast(DictConfig, OmegaConf.merge(root, difference, {"task": task}))
    for override in parse(overrides):
        name, value = str(override.key_or_group), override.value()
        chosen = isinstance(root._get_node(name), DictConfig) and not isinstance(value, dict)  # an option of a group
        if name in known and not name.startswith(("curriculum", "hydra")) and not chosen:
            OmegaConf.update(merged, name, value)
    merged.stage = stage
    if merged.init_from is not None and merged.init_parts is None:
        merged.init_parts = _init_parts(merged, overrides)
    return merged


def require_resolvable(config: DictConfig, name: str, advice: str) -> None:
    """UserError with `advice` where the value of a knob refers to something that this command does not have."""
    try:
        config[name]
    except OmegaConfBaseException as error:
        raise UserError(advice) from error


def _task(root: DictConfig, difference: DictConfig, stage: str) -> DictConfig:
    """The node of what a stage trains; knobs that the command line gives for it (`task.seed=1`) are laid over it."""
    chosen, knobs = difference.pop("task", None), root.pop("task", None)
    if knobs is not None and "_target_" in knobs:
        return cast(DictConfig, knobs)
    if chosen is None:
        raise UserError(f"curriculum.{stage}.task: not given; name what the stage trains, an option of configs/task")
    return cast(DictConfig, OmegaConf.merge(load_option("task", str(chosen)), knobs or {}))


def _init_parts(config: DictConfig, overrides: list[str]) -> list[str] | None:
    """The parts of a second stage that come from init_from: all but those whose weights are named by themselves.

    These are the first stage of first_stage_from, and a frozen text encoder whose path the command line gives; one
    that is trained merely began with those weights. None for a task without these parts.
    """
    if "${network}" not in repr(OmegaConf.to_container(config.task, resolve=False)):
        return None
    given = [str(override.key_or_group).removeprefix(f"curriculum.{config.stage}.") for override in parse(overrides)]
    named = any(name.startswith("conditioner.") and name.endswith("encoder.name_or_path") for name in given)
    kept = named and config.conditioner.get("frozen", True)
    return ["network", *([] if kept else ["conditioner"]), *([] if config.first_stage_from else ["first_stage"])]
