"""Checkpoints as files: written whole or not at all, verified, found, read without running code.

A checkpoint is a folder:

checkpoint.json        the record: the format's version, and of each file its size and SHA-256
state.json             the state's structure and plain values; tensors are named by file and name
*.safetensors          the tensors
"""

import hashlib
import json
import math
import os
import pickle
import re
import secrets
import shutil
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import UserError

PathLike = str | os.PathLike[str]

RECORD = "checkpoint.json"
STATE = "state.json"
FORMAT = 1
DAMAGE = (  # what torch's unpickler raises at damaged bytes
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error,
)  # fmt: skip

# ------------------------------------------------------------------------------------- whole or not at all


@contextmanager
def write_atomic(path: PathLike) -> Iterator[Path]:
    """A temporary path beside `path` to write to; at the end of the block it becomes `path` at once.

    The bytes are on the disk before the name changes, so a crash at any moment leaves the old file or the
    new one. An exception in the block removes the temporary file and leaves the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_folder(path: PathLike) -> Iterator[Path]:
    """A temporary folder beside `path` to write to; at the end of the block it becomes `path`.

    As `write_atomic`, for one writer at a time: what a killed one left of this folder is removed. A folder
    that has the name already is moved aside first; a crash just then leaves no folder of that name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        remove(left)
    temporary, aside = _beside(path), _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for inside in [*temporary.rglob("*"), temporary]:
            _sync(inside)
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        remove(temporary)
    remove(aside)


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder; one that is gone already is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ tensors by name


def save_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors and string metadata as one safetensors file, atomically.

    Tensors that share memory (tied weights) are written once each.
    """
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        whole = tensor.detach().contiguous()
        separate[name] = whole.clone() if memory in seen else whole
        seen.add(memory)
    with write_atomic(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(separate, temporary, metadata=dict(metadata or {}))
        temporary.chmod(mode)  # safetensors leaves a file for its owner's eyes only


def load_tensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata of a safetensors file.

    Raises UserError for a file that is missing, truncated, or of another format.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): it was cut short or is of another format; "
            "copy or write it again, or give another file"
        ) from error


def load_torch(path: PathLike, map_location: torch.device | str = "cpu") -> Any:
    """What torch.save wrote of published weights, on `map_location`; no code in the file is run.

    Raises UserError for a file that is missing, truncated, or holds more than tensors and plain types.
    """
    _require_file(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if not head.startswith((b"PK", b"\x80")):  # a zip archive, or torch's older format, a pickle
        raise UserError(
            f"{path} is no torch checkpoint, it begins with {head[:24]!r}: an empty or cut file, a web page "
            "or a git-lfs pointer instead of the weights? Download or copy it again"
        )
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} cannot be read safely: it holds Python objects besides tensors and plain types. Loading "
            "such a file could run code from it, so it is refused; if you trust it, save its weights alone "
            "(torch.save(state_dict) or safetensors) and give that file. "
            f"torch says: {_first_line(error)}"
        ) from error
    except DAMAGE as error:
        raise UserError(
            f"{path} is not a whole torch checkpoint: it was cut short or damaged ({_first_line(error)}); "
            "copy it again, or give an older one"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _require_file(path: PathLike) -> None:
    if not Path(path).is_file():
        raise UserError(f"no file at {path}: give the path of a checkpoint file")


# ------------------------------------------------------------------------------------------- nested states


def save_state(path: PathLike, state: Any, files: Mapping[str, str] | None = None) -> None:
    """Write a state, nested of tensors and plain types, as a checkpoint folder, all or nothing.

    `files` gives parts of the state a file of their own: where the part stands ("callbacks/EMA/average"; the
    longest that fits counts) to the file's name without suffix. All other tensors go to `tensors`.
    Plain types are None, bool, int, float, str, list, tuple and dict. Raises UserError for anything else.
    """
    packer = _Packer(files or {})
    tree = packer.pack(state, ())
    with write_folder(path) as folder:
        for file, tensors in packer.tensors.items():
            save_tensors(folder / f"{file}.safetensors", tensors)
        (folder / STATE).write_text(json.dumps(tree, allow_nan=False))
        facts = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())}
        (folder / RECORD).write_text(json.dumps({"format": FORMAT, "files": facts}, indent=2) + "\n")


def load_state(path: PathLike) -> Any:
    """What `save_state` wrote, tensors on the CPU; tensors that were one, or shared all memory, are one again.

    An OrderedDict comes back as a dict, a Parameter as a Tensor.
    Raises UserError where the folder is no checkpoint, or a file is not the one that was written.
    """
    path = Path(path)
    files = _record(path)
    for name, fact in files.items():
        if not (path / name).is_file() or sha256(path / name) != fact["sha256"]:
            raise UserError(
                f"{path} is damaged: its file {name} is missing or its SHA-256 is not the recorded one; "
                "copy the folder again, or remove it to use an older checkpoint"
            )
    tensors = {name.removesuffix(".safetensors"): load_tensors(path / name)[0] for name in files if name != STATE}
    return _unpack(json.loads((path / STATE).read_text()), tensors)


def _record(path: Path) -> dict[str, dict[str, Any]]:
    """Sizes and hashes of a checkpoint's files; UserError where the folder is none."""
    if not (path / RECORD).is_file():
        what = "it is a file" if path.is_file() else f"it has no {RECORD}" if path.is_dir() else "nothing is there"
        raise UserError(f"{path} is no checkpoint folder: {what}; give one such as RUN/STAGE/checkpoints/step_00001000")
    try:
        record = json.loads((path / RECORD).read_text())
        version, files = record["format"], dict(record["files"])
        files[STATE]["sha256"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged: its {RECORD} is not readable ({error}); copy it again") from error
    if version != FORMAT:
        raise UserError(f"{path} is a checkpoint of format {version}, this version reads format {FORMAT}")
    return files


class _Packer:
    """Turns a state into what JSON can hold; collects the tensors, by file and name.

    What JSON has no notation for is an object with one of the names `$tensor`, `$tuple`, `$items`, `$float`.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = {tuple(place.split("/")): file for place, file in files.items()}
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self._packed: dict[tuple[Any, ...], dict[str, Any]] = {}

    def pack(self, value: Any, at: tuple[str, ...]) -> Any:
        """The value as JSON; `at` is where it stands."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is list:
            return [self.pack(item, (*at, str(i))) for i, item in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [self.pack(item, (*at, str(i))) for i, item in enumerate(value)]}
        if kind in (dict, OrderedDict):
            return self._dict(value, at)
        if isinstance(value, Tensor) and type(value.detach()) is Tensor and value.layout == torch.strided:
            return self._tensor(value.detach(), at)
        raise UserError(
            f"the state holds a {kind.__module__}.{kind.__qualname__} at {'/'.join(at) or 'its top'}: a checkpoint "
            "keeps tensors, numbers, strings, None, lists, tuples and dicts alone; keep those of it"
        )

    def _dict(self, value: Mapping[Any, Any], at: tuple[str, ...]) -> dict[str, Any]:
        if all(type(name) is str and not name.startswith("$") for name in value):
            return {name: self.pack(item, (*at, name)) for name, item in value.items()}
        for name in value:
            if isinstance(name, Tensor | tuple):
                raise UserError(f"a dict at {'/'.join(at)} has a {type(name).__name__} as key; use numbers or strings")
        items = [[self.pack(name, at), self.pack(item, (*at, str(name)))] for name, item in value.items()]
        return {"$items": items}

    def _tensor(self, tensor: Tensor, at: tuple[str, ...]) -> dict[str, Any]:
        """The tensor's place: file, name, and its stride where that is not the usual one (channels last)."""
        memory = (str(tensor.device), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in self._packed:
            return self._packed[memory]
        prefix = max((place for place in self.files if at[: len(place)] == place), key=len, default=())
        names = self.tensors.setdefault(self.files.get(prefix, "tensors"), {})
        name = "/".join(at[len(prefix) :]) or "value"
        while name in names or name == "__metadata__":  # safetensors' own name
            name += "'"
        names[name] = tensor
        place: dict[str, Any] = {"$tensor": name, "file": self.files.get(prefix, "tensors")}
        if tensor.stride() != torch.empty(tensor.shape, device="meta").stride() and _is_dense(tensor):
            place["stride"] = list(tensor.stride())
        self._packed[memory] = place
        return place


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's values fill its memory, in any order of the dimensions."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def _unpack(value: Any, tensors: Mapping[str, dict[str, Tensor]]) -> Any:
    """The state that a packer made JSON of."""
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["$tuple"])
    if "$items" in value:
        return {_unpack(name, tensors): _unpack(item, tensors) for name, item in value["$items"]}
    if "$float" in value:
        return float(value["$float"])
    if "$tensor" in value:
        file, name, stride = tensors[value["file"]], value["$tensor"], value.get("stride")
        if stride is not None and list(file[name].stride()) != stride:  # a second mention is the same tensor
            usual = file[name]
            file[name] = torch.empty_strided(usual.shape, stride, dtype=usual.dtype).copy_(usual)
        return file[name]
    return {name: _unpack(item, tensors) for name, item in value.items()}


# ------------------------------------------------------------------------------------- hashes, finding, keeping


def sha256(path: PathLike) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    _require_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the tensors' names, dtypes, shapes and bytes; the order does not matter."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{len(name)}:{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_whole(path: PathLike) -> bool:
    """True where the folder has a record, and every file in it of the recorded size.

    Damaged bytes inside an intact length are found by `load_state`.
    """
    path = Path(path)
    try:
        return all((path / name).stat().st_size == fact["bytes"] for name, fact in _record(path).items())
    except (UserError, OSError):
        return False


def checkpoints(folder: PathLike, pattern: str = "*") -> list[Path]:
    """The whole checkpoints in `folder` whose name matches `pattern`, newest first.

    Where every name has numbers in it (`step_00001000`), they decide, which copying a folder does not change;
    else the modification time does. Torn ones are left out.
    """
    found = [path for path in Path(folder).glob(pattern) if not path.name.startswith(".") and is_whole(path)]
    numbers = {path: tuple(int(digits) for digits in re.findall(r"\d+", path.name)) for path in found}
    if all(numbers.values()):
        return sorted(found, key=lambda path: (numbers[path], path.name), reverse=True)
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def find_latest(folder: PathLike, pattern: str = "*") -> Path | None:
    """The newest whole checkpoint in `folder`, see `checkpoints`; None where there is none."""
    return next(iter(checkpoints(folder, pattern)), None)


def keep_last(folder: PathLike, n: int, pattern: str = "*") -> None:
    """Delete all but the newest n whole checkpoints, and what interrupted writes left behind before them.

    Torn ones do not count among the n, and are not touched. A deletion that is interrupted leaves no torn one.
    """
    if n < 1:
        raise UserError(f"n={n}: at least one checkpoint must be kept")
    found = checkpoints(folder, pattern)
    for path in found[n:]:
        aside = _beside(path)
        os.replace(path, aside)
        remove(aside)
    if found:
        newest_ns = found[0].stat().st_mtime_ns
        for path in Path(folder).glob(f".{pattern}.*.tmp"):
            if path.stat().st_mtime_ns < newest_ns:
                remove(path)
