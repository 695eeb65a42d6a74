"""Every knob against the constructor that it goes to: its name and its type, before anything is built."""

import builtins
import collections.abc
import importlib
import inspect
import os
import re
import types
import typing
from collections import defaultdict
from collections.abc import Callable
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.errors import UserError, nearest

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
SCALARS: dict[Any, Any] = {bool: bool, int: int, float: int | float, str: str, type(None): type(None), None: type(None)}
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
    None: "null",
}
LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
HYDRA_KEYS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}


def build(node: DictConfig, path: str = "", **arguments: Any) -> Any:
    """The object that a configuration describes, with further finished `arguments`; its knobs are checked first.

    Raises UserError for a knob that does not fit, and where a constructor fails: the knob that describes it, and the
    constructor's own message.
    """
    check(node, path, frozenset(arguments))
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(
            f"{_failed(node, path, str(error))} cannot be built: {type(cause).__name__}: {str(cause).strip()} "
            "(HYDRA_FULL_ERROR=1 shows the traceback)"
        ) from error


def _failed(node: DictConfig, path: str, message: str) -> str:
    """The knob and the class of the constructor that failed, from the message of Hydra's `instantiate`."""
    target = re.search(r"target '([\w.]+)'", message)
    full_key = re.search(r"full_key: (\S+)", message)
    name, current = path, cast(Any, node)
    for part in full_key[1].removeprefix(path).strip(".").split(".") if full_key else ():
        inside = isinstance(current, DictConfig) and part in current
        name = _origin(current, part, f"{name}." if name else "") if inside else f"{name}.{part}".strip(".")
        current = current[part] if inside else None
    return f"{name}: {target[1] if target else node['_target_']}"


def build_on_meta(node: DictConfig, path: str) -> Any:
    """The object without memory for its weights, for its shapes.

    Where a constructor needs real numbers (`Tensor.item()`, pretrained weights) the whole object.
    """
    import torch  # here, so that a command that only checks names does without it

    try:
        with torch.device("meta"):
            return build(node, path)
    except UserError as error:
        if isinstance(error.__cause__, InstantiationException):
            return build(node, path)
        raise


def check(node: Any, path: str = "", supplied: frozenset[str] = frozenset()) -> None:
    """Raises UserError for a `_target_` that does not exist, a knob it does not have or misses, or of another type.

    `supplied` are arguments that the node's constructor gets from the code.
    """
    if isinstance(node, ListConfig):
        for i in range(len(node)):
            check(node[i], f"{path}[{i}]")
        return
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    if "_target_" in node:
        _check_arguments(node, path, supplied)
    for name in node:
        if not OmegaConf.is_missing(node, name):
            check(node[name], _origin(node, str(name), f"{path}." if path else ""))


def locate(target: str) -> Callable[..., Any]:
    """The class or function with a dotted name; UserError where there is none."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module}.".startswith(f"{error.name}."):
                continue
            raise UserError(f"{target} needs the package {error.name}, which is not installed") from error
        for name in parts[cut:]:
            if not hasattr(found, name):
                members = [m for m in dir(found) if not m.startswith("_")]
                raise UserError(f"_target_: {target}: there is no {name}; {nearest(name, members)}")
            found = getattr(found, name)
        if callable(found):
            return found  # type: ignore[no-any-return]
    raise UserError(
        f"_target_: {target}: there is no such class or function (packages are looked up in the current folder too)"
    )


def takes(target: str, name: str) -> bool:
    """Whether the class or function has an argument of that name (`**kwargs` do not count)."""
    try:
        parameter = inspect.signature(locate(target)).parameters.get(name)
    except ValueError:  # a builtin without a signature
        return True
    return parameter is not None and parameter.kind in NAMED


def _check_arguments(node: DictConfig, path: str, supplied: frozenset[str]) -> None:
    target = locate(str(node["_target_"]))
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return  # a builtin without a signature: its constructor will judge
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    known = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    keys = {str(name) for name in node} - HYDRA_KEYS
    prefix = f"{path}." if path else ""
    for name in sorted(keys - set(known)):
        if not open_ended:
            raise UserError(f"{prefix}{name}: {node['_target_']} has no such knob; {nearest(name, known)}")
    missing = [name for name in keys if OmegaConf.is_missing(node, name)]
    if not node.get("_partial_", False) and not node.get("_args_"):
        missing += [
            name
            for name, p in parameters.items()
            if p.default is inspect.Parameter.empty and p.kind in NAMED and name not in keys | supplied
        ]
    if missing:
        raise UserError(f"{path}: {node['_target_']} needs {', '.join(sorted(missing))}; give {prefix}{missing[0]}=...")
    hints = _hints(target)
    for name in sorted(keys & hints.keys()):
        check_type(node[name], hints[name], _origin(node, name, prefix))


def check_type(value: Any, hint: Any, name: str) -> None:
    """Raises UserError where the value of the knob `name` may not go to an argument with this annotation."""
    if not _fits(value, hint):
        shown = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        raise UserError(f"{name}={shown!r}: expected {_words(hint)}")


def _origin(node: DictConfig, name: str, prefix: str) -> str:
    """The knob that a value comes from: the one that an interpolation names, else its own."""
    raw = node._get_node(name)
    reference = re.fullmatch(r"\$\{([\w.]+)\}", str(raw._value())) if raw is not None else None
    return reference[1] if reference else f"{prefix}{name}"


# ------------------------------------------------------------------------------------------------------- types


@cache
def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a constructor's or a function's arguments; none where they cannot be read.

    A name that is imported for type checkers alone stands for anything.
    """
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    names = defaultdict(lambda: Any, vars(builtins) | getattr(function, "__globals__", {}))
    try:
        return typing.get_type_hints(function, localns=names)
    except (NameError, TypeError, AttributeError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a configuration's value may go to an argument with this annotation; what cannot be judged may."""
    if OmegaConf.is_dict(value) and "_target_" in value:
        return True  # an object that is still to be built
    if hint in SCALARS:
        return isinstance(value, SCALARS[hint]) and (hint is bool or not isinstance(value, bool))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is typing.Annotated:
        return _fits(value, arguments[0])
    kind = origin or hint
    if kind in LISTS:
        if not OmegaConf.is_list(value) or not arguments:
            return OmegaConf.is_list(value)
        if kind is tuple and Ellipsis not in arguments:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return all(_fits(item, arguments[0]) for item in value)
    if kind in (dict, collections.abc.Mapping):
        return OmegaConf.is_dict(value) and (not arguments or all(_fits(v, arguments[1]) for v in value.values()))
    if inspect.isclass(kind) and isinstance(value, bool | int | float | str):
        path = kind in (Path, os.PathLike) and isinstance(value, str)
        return path or kind is object or issubclass(kind, Enum) or isinstance(value, kind)
    return True


def _words(hint: Any) -> str:
    """An annotation in words: "a number or null"."""
    if hint in WORDS:
        return WORDS[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(option) for option in arguments))
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin in LISTS:
        if origin is tuple and arguments and Ellipsis not in arguments:
            return f"a list of {len(arguments)}"
        plural = {int: " of whole numbers", float: " of numbers", str: " of texts"}
        return f"a list{plural.get(arguments[0], '') if arguments else ''}"
    if origin in (dict, collections.abc.Mapping):
        return "a mapping"
    return getattr(hint, "__name__", str(hint))
