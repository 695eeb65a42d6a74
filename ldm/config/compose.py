"""Composition: from a command's overrides to one configuration, with errors that name the nearest knobs."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.check import takes
from ldm.config.infer import fits
from ldm.config.processes import agreed
from ldm.errors import UserError, nearest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """The configuration that the command `config_name` gets from these overrides; UserError for unknown ones."""
    with suppress(HydraException, OmegaConfBaseException):
        return _compose(config_name, overrides)
    try:
        return _compose(config_name, completed(config_name, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, config_name, overrides)) from error


def parse(overrides: list[str]) -> list[Override]:
    """The overrides, parsed; UserError where one is not of the form name=value."""
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise UserError(f"{text!r}: expected name=value, for example experiment=quickstart")
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise UserError(f"an override can't be read: {_first_line(error)}") from error


def quoted(text: str) -> str:
    """A text as an override's value that is taken letter by letter, commas, brackets and `${` as well."""
    text = re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", text)
    ends = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{ends}'"


def with_texts(overrides: list[str], knobs: Sequence[str]) -> list[str]:
    """The overrides, with the values of these knobs taken as they stand, not as Hydra's grammar.

    Values in quotes of their own, empty ones and `null` keep their meaning.
    """
    result = []
    for override in overrides:
        name, _, value = override.partition("=")
        plain = name in knobs and value not in ("", "null") and not re.fullmatch(QUOTED, value)
        result.append(f"{name}={quoted(value)}" if plain else override)
    return result


def completed(config_name: str, overrides: list[str]) -> list[str]:
    """The overrides, with Hydra's `++` before those that add an argument which a constructor takes.

    So `optimizer.eps=1e-6` is accepted, and `curriculum.base.optimizer.lr=1e-4`, where the YAML does not list them.
    """
    try:
        parsed = parse(overrides)
        cfg = _compose(
            config_name, [t for o, t in zip(parsed, first_of_sweeps(overrides), strict=True) if _is_group(o)]
        )
    except (UserError, HydraException, OmegaConfBaseException):
        return overrides  # what is wrong is told when all of them are composed
    known = set(names(cfg))
    return [
        f"++{text}" if _is_plain(o) and _may_be_added(cfg, known, o.key_or_group) else text
        for o, text in zip(parsed, overrides, strict=True)
    ]


def _is_plain(override: Override) -> bool:
    return not (override.is_add() or override.is_force_add() or override.is_delete())


def _is_group(override: Override) -> bool:
    return (CONFIGS / override.key_or_group).is_dir()


def _may_be_added(cfg: DictConfig, known: set[str], name: str) -> bool:
    """Whether a name that is not in the configuration is an argument of the constructor beside it."""
    if name in known:
        return False
    room, _, rest = name.partition(".")
    if rest and (CONFIGS / room).is_dir() and cfg.get(room) is None:  # shim: a knob under a null group
        return True
    if room == "curriculum":
        stage, _, rest = rest.partition(".")
        return stage in cfg.curriculum and (rest in known or _may_be_added(cfg, known, rest))
    parent, _, last = name.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent in known else None
    return isinstance(node, DictConfig) and "_target_" in node and takes(str(node["_target_"]), last)


def first_of_sweeps(overrides: list[str]) -> list[str]:
    """The overrides with each sweep (`lr=1e-4,2e-4`, `lr=interval(1e-5,1e-3)`) replaced by its first value."""
    return [
        f"{o.get_key_element()}={_first_value(o)}" if o.is_sweep_override() else text
        for o, text in zip(parse(overrides), overrides, strict=True)
    ]


def _first_value(sweep: Override) -> str:
    value = sweep.value()
    if isinstance(value, IntervalSweep):
        return str(value.start)
    if isinstance(value, Glob):
        found = value.filter(sorted(file.stem for file in (CONFIGS / sweep.key_or_group).glob("*.yaml")))
        if not found:
            raise UserError(f"{sweep.input_line}: no {sweep.key_or_group} has such a name")
        return found[0]
    return next(iter(sweep.sweep_string_iterator()))


def names(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of everything in a configuration."""
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        for name in node:
            yield f"{prefix}{name!s}"
            yield from names(node._get_node(name), f"{prefix}{name!s}.")


def register_resolvers() -> None:
    """Makes `${run_dir:...}`, `${sweep_dir:...}`, `${multiply:...}` and `${fits:...}` known to OmegaConf."""
    OmegaConf.register_new_resolver("run_dir", lambda *given: agreed("run", _run_dir(*given)), replace=True)
    OmegaConf.register_new_resolver("sweep_dir", lambda folder: agreed("sweep", folder), replace=True)
    OmegaConf.register_new_resolver("multiply", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("fits", fits, replace=True)


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    register_resolvers()
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose(config_name, overrides=overrides)
    finally:
        GlobalHydra.instance().hydra = before


def _explain(error: Exception, config_name: str, overrides: list[str]) -> str:
    """What is wrong with the overrides, with the nearest names; Hydra's own first line where nothing fits."""
    parsed = parse(overrides)
    groups = {str(p.relative_to(CONFIGS)): p for p in CONFIGS.rglob("*") if p.is_dir()}
    for override in parsed:
        group = override.key_or_group.split("@")[0]
        if group in groups:
            options = [str(f.relative_to(groups[group]).with_suffix("")) for f in groups[group].rglob("*.yaml")]
            given = str(override.value())
            if given not in (*options, "null", "None"):
                return f"{group}={given}: there is no such {group}; {nearest(given, options)}"
    kept = [text for o, text in zip(parsed, overrides, strict=True) if o.key_or_group in groups]
    try:
        known = {*names(_compose(config_name, kept)), *groups}
    except (HydraException, OmegaConfBaseException):
        return _first_line(error)
    for override, text in zip(parsed, overrides, strict=True):
        name = override.key_or_group
        if not text.startswith(("+", "hydra.")) and name not in known:
            return f"{name}: there is no such knob; {_nearest_knob(name, known)}"
    return _first_line(error)


def _nearest_knob(name: str, known: set[str]) -> str:
    """The nearest names, those with the same last part first."""
    same = [k for k in known if k.split(".")[-1] == name.split(".")[-1]]
    return nearest(name, same or known)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _run_dir(root: str, name: str, time: str, resume: str | None) -> str:
    """The run's folder: a new one, or with resume=auto the newest there is, or with resume=PATH that one's."""
    fresh = os.path.join(root, name, time)
    if resume is None:
        return fresh
    if resume == "auto":
        runs = [folder for folder in Path(root, name).glob("*") if (folder / ".hydra").is_dir()]
        return str(max(runs, key=lambda folder: folder.name)) if runs else fresh
    path = Path(resume).absolute()
    for folder in (path, *list(path.parents)[:3]):
        if (folder / ".hydra").is_dir():
            return os.path.relpath(folder)
    return fresh  # train.py then refuses the path
