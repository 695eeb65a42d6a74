"""Every knob against the constructor that it goes to, before anything is built."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.errors import UserError, nearest

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
HYDRA_KEYS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}


def build(node: DictConfig, path: str = "") -> Any:
    """The object that a configuration describes; its knobs are checked first."""
    check(node, path)
    return instantiate(node, _convert_="all")


def check(node: Any, path: str = "") -> None:
    """Raises UserError for a `_target_` that does not exist, a knob it does not have, or one that it misses."""
    if isinstance(node, ListConfig):
        for i, part in enumerate(node):
            check(part, f"{path}[{i}]")
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    if "_target_" in node:
        _check_arguments(node, path)
    for name in node:
        if not OmegaConf.is_missing(node, name):
            check(node[name], f"{path}.{name!s}" if path else str(name))


def locate(target: str) -> Callable[..., Any]:
    """The class or function with a dotted name; UserError where there is none."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name is not None and ".".join(parts[:cut]).startswith(error.name):
                continue
            raise UserError(f"{target} needs the package {error.name}, which is not installed") from error
        for name in parts[cut:]:
            if not hasattr(found, name):
                members = [m for m in dir(found) if not m.startswith("_")]
                raise UserError(f"_target_: {target}: there is no {name}; {nearest(name, members)}")
            found = getattr(found, name)
        if callable(found):
            return found  # type: ignore[no-any-return]
    raise UserError(f"_target_: {target}: there is no such class or function")


def takes(target: str, name: str) -> bool:
    """Whether the class or function has an argument of that name (`**kwargs` do not count)."""
    parameter = inspect.signature(locate(target)).parameters.get(name)
    return parameter is not None and parameter.kind in NAMED


def _check_arguments(node: DictConfig, path: str) -> None:
    target = locate(str(node["_target_"]))
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    known = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    given = {str(name) for name in node} - HYDRA_KEYS
    for name in sorted(given - set(known)):
        if not open_ended:
            raise UserError(f"{path}.{name}: {node['_target_']} has no such knob; {nearest(name, known)}")
    missing = [name for name in given if OmegaConf.is_missing(node, name)]
    if not node.get("_partial_", False) and not node.get("_args_"):
        missing += [
            name
            for name, p in parameters.items()
            if p.default is inspect.Parameter.empty and p.kind in NAMED and name not in given
        ]
    if missing:
        raise UserError(f"{path}: {node['_target_']} needs {', '.join(sorted(missing))}; give {path}.{missing[0]}=...")
