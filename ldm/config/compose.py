"""Composition: one Hydra composition a command; unknown knobs are rejected with the nearest names.

Hydra is extended in three places, at import, so that every composition behaves alike (a command's, each job's
of a sweep, a contact sheet's cell, also in the processes of a launcher plugin): an override may name an argument that
a constructor takes and the YAML does not list, and what cannot be composed is a UserError of one line.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.default_element import ConfigDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ldm.config.check import takes
from ldm.config.overrides import first_line, parse
from ldm.config.run_folder import register_resolvers
from ldm.errors import UserError, nearest

_ROOT = Path(__file__).resolve().parents[1]
CONFIGS = next(path for path in (_ROOT / "configs", _ROOT.parent / "configs") if (path / "train.yaml").is_file())
"""The shipped configurations: inside the installed package, or of the checkout."""

OPEN = ("callbacks", "logger", "loss.auxiliary", "evaluation.sets", "data.mixed_with", "metric_options")
"""Mappings whose keys are the user's: names of callbacks, loggers, losses, sets, sources, metrics."""
DEFERRED = ("task", "sampler", "grid", "guidance")
"""Groups that may be null in a command: the curriculum or the trained model then says what they are."""
OVER_ALL = ("experiment", "variant")
"""Groups whose options change the whole configuration; they have no knobs of their own."""


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of the command `config_name` under these overrides; UserError for what cannot be composed.

    Within a command the search path is the command's, `--config-dir` and `hydra.searchpath` included.
    """
    with _initialized():
        return hydra.compose(config_name, overrides=list(overrides))


def options(group: str) -> list[str]:
    """The options of a config group, in the whole search path."""
    with _initialized():
        return GlobalHydra.instance().config_loader().get_group_options(group)


def load_option(group: str, name: str) -> DictConfig:
    """One option of a group: its file, over those of the same group in its defaults list.

    UserError for an unknown one, and for defaults of another group.
    """
    known = options(group)
    if name not in known:
        raise UserError(f"{group}={name}: there is no such {group}; {nearest(name, known)}")
    with _initialized():
        loader = cast(ConfigLoaderImpl, GlobalHydra.instance().config_loader())
        _require_one_file(loader, f"{group}/{name}")
        files = dict(_files(loader, f"{group}/{name}"))
        for path in files:
            for entry in cast(ConfigResult, loader.repository.load_config(path)).defaults_list or []:
                if not isinstance(entry, ConfigDefault) or "/" in str(entry.path):
                    raise UserError(f"{path}.yaml: its defaults list may name options of {group} only; write it out")
        return cast(DictConfig, OmegaConf.merge({}, *files.values()))


@contextmanager
def _initialized() -> Iterator[None]:
    """Hydra as the running command has set it up, else over the shipped configurations."""
    register_resolvers()
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def names(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of everything in a configuration; a list is one thing."""
    if isinstance(node, DictConfig):
        for name, child in _children(node).items():
            yield f"{prefix}{name}"
            yield from names(child, f"{prefix}{name}.")


def _children(node: Any) -> dict[str, Any]:
    """What a mapping or a list holds, by name or number, interpolations as they are; nothing of any other node."""
    if (
        not isinstance(node, DictConfig | ListConfig)
        or node._is_none()
        or node._is_missing()
        or node._is_interpolation()
    ):
        return {}
    keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
    return {str(key): node._get_node(key) for key in keys}


def interpolated(node: Any) -> set[str]:
    """The first names of everything that a configuration refers to: "seed" of `${seed}`, "data" of `${data.size}`."""
    texts = repr(OmegaConf.to_container(node, resolve=False))
    return set(re.findall(r"\$\{(?:[\w]+:)?(\w+)", texts)) | set(re.findall(r"[,:]\$\{(\w+)", texts))


# ---------------------------------------------------------------------------------------------- Hydra's loader

_load_configuration = ConfigLoaderImpl.load_configuration


def _load(
    loader: ConfigLoaderImpl,
    config_name: str | None,
    overrides: list[str],
    run_mode: RunMode,
    from_shell: bool = True,
    validate_sweep_overrides: bool = True,
) -> DictConfig:
    """Hydra's `load_configuration`; UserError of one line for what cannot be composed."""
    parsed = parse(overrides)
    root: Any = OmegaConf.load(CONFIGS / f"{config_name}.yaml") if config_name else {}
    values = {key for key in map(str, root) if (CONFIGS / key).is_dir()}  # not groups there: `data` of evaluate.py
    groups = [o.input_line or "" for o in parsed if o.key_or_group not in values or o.is_sweep_override()]
    try:
        _, repository = loader._parse_overrides_and_create_caching_repo(config_name, groups)
        loader.repository = cast(ConfigRepository, repository.delegate)  # with hydra.searchpath
        null = {
            text for text in groups if text.endswith("=null") and repository.group_exists(text.removesuffix("=null"))
        }
        groups = [f"~{text.removesuffix('=null')}" if text in null else text for text in groups]  # as Hydra has it
        files = loader.compute_defaults_list(config_name, groups, run_mode).defaults
        cfg = _load_configuration(loader, config_name, groups, run_mode, from_shell, validate_sweep_overrides)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: an option that is no text
        raise UserError(_explain(loader, parsed, error)) from error
    if config_name is None:
        return cfg
    mode_given = any(o.key_or_group == "hydra.mode" for o in parsed)  # also by -m, in each job of a sweep
    if run_mode is RunMode.RUN and from_shell and cfg.hydra.mode is RunMode.MULTIRUN and not mode_given:
        raise UserError("hydra.mode=MULTIRUN: a configuration cannot start a sweep; give -m on the command line")
    rest = [o for o in parsed if o.key_or_group in values and not o.is_sweep_override()]
    _apply(rest, cfg)
    cfg.hydra.overrides.task += [o.input_line for o in rest]
    if run_mode is RunMode.MULTIRUN:
        _name_jobs_by_sweep(cfg, parsed)
        for override in parsed:
            if override.is_sweep_override():
                _require_swept(cfg, loader, override)
    _require_distinct_names(loader, [str(file.config_path) for file in files if file.config_path])
    _drop_replaced_knobs(cfg, loader)
    _require_no_idle_root_key(cfg, config_name)
    return cfg


def _apply(overrides: list[Override], cfg: DictConfig) -> None:
    """Hydra's `_apply_overrides_to_config`, for names that exist or that the constructor beside them takes."""
    for override in sorted(overrides, key=lambda override: not override.key_or_group.endswith("._target_")):
        name = override.key_or_group
        if override.package is not None:
            groups = [path.name for path in CONFIGS.iterdir() if path.is_dir()]
            raise UserError(f"{override.input_line}: there is no config group {name!r}; {nearest(name, groups)}")
        if name.split(".")[0] == "hydra" or override.is_delete():
            _apply_overrides([override], cfg)
            continue
        _require_knob(cfg, override)
        value = override.value()
        node = _node(cfg, name)
        whole = isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation()
        if whole and value is not None and not isinstance(value, dict):
            inside = ", ".join(f"{name}.{key}" for key in list(node)[:4])
            raise UserError(f"{name}={value}: {name} has knobs of its own ({inside}); give one of them, or {name}=null")
        with open_dict(cfg):
            OmegaConf.update(cfg, name, value, merge=True, force_add=True)


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    """Hydra's `get_mode`, from the command line alone; Hydra composes the whole configuration once more for it."""
    if {"-m", "--multirun"} & set(sys.argv):
        return None
    multirun = any(o.key_or_group == "hydra.mode" and o.value() == "MULTIRUN" for o in parse(overrides))
    return RunMode.MULTIRUN if multirun else RunMode.RUN


_apply_overrides = ConfigLoaderImpl._apply_overrides_to_config
ConfigLoaderImpl.load_configuration = _load  # type: ignore[method-assign, assignment]
ConfigLoaderImpl._apply_overrides_to_config = staticmethod(_apply)  # type: ignore[method-assign]
Hydra.get_mode = _mode  # type: ignore[method-assign, assignment]


def _node(cfg: DictConfig, name: str) -> Any:
    """The node with a dotted name, its interpolations as they are; None where there is none."""
    node: Any = cfg
    for part in name.split("."):
        node = _children(node).get(part)
    return node


def _require_knob(cfg: DictConfig, override: Override) -> None:
    """UserError for a name that is not in the configuration and that no constructor takes."""
    name, known = override.key_or_group, set(names(cfg))
    if _node(cfg, name) is not None or _may_be_added(cfg, known, name):
        return
    if "/" in name:
        raise UserError(f"{override.input_line}: no folder has {name}/; name one that does with --config-dir")
    parent = name.rpartition(".")[0]
    known |= {f"{parent}.{key}" for key in _children(_node(cfg, parent))}
    groups = [str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_dir()]
    known = {knob for knob in known if knob.split(".")[0] != "hydra" and "._" not in knob} | set(groups)
    raise UserError(f"{name}: there is no such knob; {_nearest_knob(name, known)}")


def _require_swept(cfg: DictConfig, loader: ConfigLoaderImpl, override: Override) -> None:
    """UserError for a sweep over a knob or options that do not exist, before the first job runs."""
    group, value = override.key_or_group, override.value()
    if not loader.repository.group_exists(group):
        _require_knob(cfg, override)
        return
    if isinstance(value, Glob) and not value.filter(loader.get_group_options(group)):
        raise UserError(f"{override.input_line}: no {group} fits; {nearest('', loader.get_group_options(group))}")
    unknown = _unknown_option(loader, group, value.list if isinstance(value, ChoiceSweep) else [])
    if unknown:
        raise UserError(unknown)


def _may_be_added(cfg: DictConfig, known: set[str], name: str) -> bool:
    """Whether a name that the YAML does not list has an effect all the same."""
    room, _, rest = name.partition(".")
    if room == "curriculum":
        stage, _, rest = rest.partition(".")
        in_list = re.search(r"\.\d+(\.|$)", rest)  # lists are replaced as a whole there
        return stage in cfg.curriculum and not in_list and (rest in known or _may_be_added(cfg, known, rest))
    parent, _, last = name.rpartition(".")
    if is_open(name):
        return True
    if parent and room not in known and room in DEFERRED:
        return True  # a group at null: the knob changes what a stage or a model brings, and is checked there
    if last == "_target_" and "." in parent and _may_be_added(cfg, known, parent):
        return True  # an object for an argument that the YAML leaves out
    node = _node(cfg, parent) if parent else None
    return isinstance(node, DictConfig) and "_target_" in node and takes(str(node["_target_"]), last)


def is_open(name: str) -> bool:
    """Whether a knob is inside of a mapping whose keys are the user's."""
    return any(name.startswith(f"{path}.") for path in OPEN)


def _require_no_idle_root_key(cfg: DictConfig, config_name: str) -> None:
    """UserError for a key at the top of a configuration that neither the command nor an interpolation reads."""
    shipped = OmegaConf.load(CONFIGS / f"{config_name}.yaml")
    groups = {str(group) for entry in shipped.defaults if OmegaConf.is_dict(entry) for group in entry}
    known = {str(key) for key in shipped if key != "defaults"} | groups - set(OVER_ALL)
    for name in map(str, cfg):
        if name not in known and name not in interpolated(cfg):
            raise UserError(f"{name}: nothing reads this key; {nearest(name, known - {'hydra'})}")


def _require_one_file(loader: ConfigLoaderImpl, path: str) -> None:
    """UserError where two folders of the search path have an option: one of them would be ignored."""
    folders = {os.path.realpath(s.path) for s in loader.repository.get_sources() if s.path and s.is_config(path)}
    if len(folders) > 1:
        raise UserError(f"{path}.yaml is in {' and in '.join(sorted(folders))}; give one of them another name")


def _drop_replaced_knobs(cfg: DictConfig, loader: ConfigLoaderImpl) -> None:
    """Removes what a shipped option says of one class from a node whose `_target_` is now another one.

    So `network: {_target_: mine.DiT, width: 64}` in an experiment needs no list of what a UNet's options were, and
    variant=tiny shrinks a UNet alone. A value that the user gave stays, and is checked.
    """
    choices = cfg.hydra.runtime.choices
    variant = _option(loader, f"variant/{choices.get('variant')}") if choices.get("variant") else OmegaConf.create()
    for group, choice in choices.items():
        node = cfg.get(group) if group in cfg else None
        if isinstance(node, DictConfig) and isinstance(choice, str) and "_target_" in node:
            option = _option(loader, f"{group}/{choice}")
            if option.get("_target_") != node["_target_"]:
                _drop(node, [option, variant.get(group) or {}])


def _drop(node: DictConfig, sources: Sequence[Any]) -> None:
    target, raw = str(node["_target_"]), OmegaConf.to_container(node, resolve=False)
    assert isinstance(raw, dict)
    for name in raw:
        shipped = any(name in source and source._get_node(name) == node._get_node(name) for source in sources if source)
        if shipped and not str(name).startswith("_") and not takes(target, str(name)):
            with open_dict(node):
                del node[name]


def _require_distinct_names(loader: ConfigLoaderImpl, paths: Sequence[str]) -> None:
    """UserError where two of a composition's files define one callback or logger: one would be laid over the other."""
    defined: dict[str, str] = {}
    for path in paths:
        _require_one_file(loader, path)
        group, _, rest = path.partition("/")
        if rest and group in ("callbacks", "logger"):
            for name in map(str, cast(ConfigResult, loader.repository.load_config(path)).config):
                if defined.setdefault(f"{group}.{name}", path) != path:
                    both = f"{defined[f'{group}.{name}']}.yaml and {path}.yaml"
                    raise UserError(f"{group}.{name}: both {both} define it; give one another name")


def _option(loader: ConfigLoaderImpl, path: str) -> DictConfig:
    """An option's file with those that it builds on."""
    return cast(DictConfig, OmegaConf.merge({}, *(content for _, content in _files(loader, path))))


def _files(loader: ConfigLoaderImpl, path: str) -> Iterator[tuple[str, DictConfig]]:
    """An option's file and those of its group that it builds on, these first, by path."""
    found = loader.repository.load_config(path)
    if found is None:
        return
    for entry in found.defaults_list or []:
        name = entry.get_name() if isinstance(entry, ConfigDefault) else None
        if name and name != "_self_":
            yield from _files(loader, f"{path.rpartition('/')[0]}/{name}")
    yield path, cast(DictConfig, OmegaConf.create(OmegaConf.to_container(found.config)))


def _name_jobs_by_sweep(cfg: DictConfig, overrides: Iterable[Override]) -> None:
    """Names the folders of a sweep by what is swept alone; each job gets the setting as an override of Hydra's."""
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    swept |= set(cfg.hydra.sweeper.get("params") or {})
    constant = [o.get_key_element() for o in overrides if o.key_or_group not in swept and not o.is_hydra_override()]
    if swept and constant:
        keys = ",".join(f"'{key}'" for key in dict.fromkeys(constant))
        cfg.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{keys}]")


def _explain(loader: ConfigLoaderImpl, overrides: Sequence[Override], error: Exception) -> str:
    """What is wrong, with the nearest names; Hydra's own first line where it is not a name."""
    repository = loader.repository
    for override in overrides:
        group = override.key_or_group
        if override.is_sweep_override() or not repository.group_exists(group):
            continue
        if override.package is not None and not override.is_add():
            return f"{override.input_line}: nothing is selected there; give {group}={override.value()}"
        unknown = _unknown_option(loader, group, [override.value()])
        if unknown:
            return unknown
    return first_line(error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error)


def _unknown_option(loader: ConfigLoaderImpl, group: str, values: Sequence[Any]) -> str | None:
    """What is wrong with the first option that a group does not have; a value may be a list of options."""
    repository, known = loader.repository, loader.get_group_options(group)
    for choice in [entry for value in values for entry in (value if isinstance(value, list) else [value])]:
        name = choice.text if isinstance(choice, QuotedString) else str(choice)
        if choice is not None and name not in known and not repository.config_exists(f"{group}/{name}"):
            folders = [source.path for source in repository.get_sources() if source.provider != "hydra"]
            where = ", ".join(folder for folder in folders if folder)
            return f"{group}={name}: there is no such {group}; {nearest(name, known)} (looked in {where})"
    return None


def _nearest_knob(name: str, known: set[str]) -> str:
    """The nearest names: those that end alike (`callbacks.ema.decay` for `ema.decay`), else in its group, else any."""
    room, last = name.split(".")[0], name.split(".")[-1]
    ends_alike = [knob for knob in known if f".{knob}".endswith(f".{name}")]
    same_last = [knob for knob in known if knob.split(".")[-1] == last]
    inside = [knob for knob in known if knob.startswith(f"{room}.")] if room != name else []
    near = ends_alike or same_last or inside
    return nearest(name, near, always=True) if near else nearest(room, {knob for knob in known if "." not in knob})
