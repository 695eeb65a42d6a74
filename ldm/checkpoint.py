"""Checkpoints as files: written whole or not at all, verified, found, read without running code."""

import hashlib
import os
import pickle
import re
import secrets
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import UserError

PathLike = str | os.PathLike[str]


@contextmanager
def write_atomic(path: PathLike) -> Iterator[Path]:
    """A temporary path beside `path` to write to; at the end of the block it becomes `path` at once.

    The bytes are on the disk before the name changes, so a crash at any moment leaves the old file or the
    new one. An exception in the block removes the temporary file and leaves the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        save_file(separate, temporary, metadata=dict(metadata or {}))


def load_tensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata of a safetensors file.

    Raises UserError for a file that is missing, truncated, or of another format.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): it was cut short or is of another format; "
            "copy or write it again, or give another file"
        ) from error


def save_torch(path: PathLike, obj: object) -> None:
    """Write an object of tensors, lists, dicts and plain types with torch.save, atomically."""
    with write_atomic(path) as temporary:
        torch.save(obj, temporary)


def load_torch(path: PathLike, map_location: torch.device | str = "cpu") -> Any:
    """What `save_torch` wrote (or Lightning), on `map_location`; no code in the file is run.

    Raises UserError for a file that is missing, truncated, or holds more than tensors and plain types.
    """
    _require_file(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if not head.startswith((b"PK", b"\x80")):  # a zip archive, or torch's older format, a pickle
        raise UserError(
            f"{path} is no torch checkpoint, it begins with {head[:24]!r}: an empty or cut file, a web page "
            "or a git-lfs pointer in the place of the weights? Download or copy it again"
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
    except (RuntimeError, EOFError, OSError, LookupError, struct.error) as error:
        raise UserError(
            f"{path} is not a whole torch checkpoint: it was cut short or damaged ({_first_line(error)}); "
            "copy it again, or give an older one"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _require_file(path: PathLike) -> None:
    if not Path(path).is_file():
        raise UserError(f"no file at {path}: give the path of a checkpoint file")


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
    """True where the file's own table of contents says that nothing is missing.

    Reads that table alone: a safetensors header, or else the directory at the end of the zip archive that
    torch.save writes. Damaged bytes inside an intact length are found by comparing `sha256`.
    """
    try:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return True
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (SafetensorError, OSError, zipfile.BadZipFile, struct.error):
        return False


def checkpoints(folder: PathLike, pattern: str = "*.ckpt") -> list[Path]:
    """The whole checkpoints in `folder` whose name matches `pattern`, newest first.

    Where every name has numbers in it (`step=1000.ckpt`), they decide, which copying a folder does not
    change; else the modification time does. Torn files are left out.
    """
    files = [path for path in Path(folder).glob(pattern) if not path.name.startswith(".") and is_whole(path)]
    numbers = {path: tuple(int(digits) for digits in re.findall(r"\d+", path.stem)) for path in files}
    if all(numbers.values()):
        return sorted(files, key=lambda path: (numbers[path], path.name), reverse=True)
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def find_latest(folder: PathLike, pattern: str = "*.ckpt") -> Path | None:
    """The newest whole checkpoint in `folder`, see `checkpoints`; None where there is none."""
    return next(iter(checkpoints(folder, pattern)), None)


def keep_last(folder: PathLike, n: int, pattern: str = "*.ckpt") -> None:
    """Delete all but the newest n whole checkpoints, and what interrupted writes left behind before them.

    Torn files do not count among the n, and are not touched.
    """
    if n < 1:
        raise UserError(f"n={n}: at least one checkpoint must be kept")
    found = checkpoints(folder, pattern)
    for path in found[n:]:
        path.unlink(missing_ok=True)
    if found:
        newest_ns = found[0].stat().st_mtime_ns
        for path in Path(folder).glob(f".{pattern}.*.tmp"):
            if path.stat().st_mtime_ns < newest_ns:
                path.unlink(missing_ok=True)
