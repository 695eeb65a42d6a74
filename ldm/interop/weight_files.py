"""The weights of a diffusers folder's parts as files: one, several with an index, variants, old pickles."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import load_tensors, load_torch, save_tensors
from ldm.errors import UserError

SHARD_bytes = 5_000_000_000
MODEL_FILE, TEXT_FILE = "diffusion_pytorch_model", "model"
OLD = {TEXT_FILE: "pytorch_model"}  # what transformers called it before safetensors
VARIANTS = ("", ".fp16", ".bf16", ".fp32", ".ema")  # the first that is there is read
RAW = ".non_ema"  # a variant's name of what others call raw weights

Loaded = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors by name, and a safetensors file's metadata."""


def read_weights(folder: Path, name: str, raw: bool = False) -> Loaded:
    """A part's tensors and metadata, `raw` ones where there are such; UserError where there are none, or not all."""
    for variant in (RAW, *VARIANTS) if raw else (*VARIANTS, RAW):
        for stem, suffix in ((name, "safetensors"), (OLD.get(name, name), "bin")):
            whole, index = folder / f"{stem}{variant}.{suffix}", folder / f"{stem}.{suffix}.index{variant}.json"
            if whole.is_file():
                return read_file(whole)
            if index.is_file():
                return _read_shards(folder, index)
    raise UserError(f"{folder} has no weights: expected {name}.safetensors, or its parts with an index")


def has_raw(folder: Path, name: str) -> bool:
    """Whether a part has raw weights in addition to the averaged ones."""
    return any(folder.glob(f"{name}{RAW}.*")) or any(folder.glob(f"{name}.*.index{RAW}.json"))


def read_file(path: Path) -> Loaded:
    """The tensors and the metadata in one file, safetensors or pickle."""
    if path.suffix == ".safetensors":
        return load_tensors(path)
    return tensors_of(load_torch(path), path), {}


def _read_shards(folder: Path, index: Path) -> Loaded:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{index} names no files (weight_map): copy it again")
    missing = sorted({file for file in files.values() if not (folder / file).is_file()})
    if missing:
        raise UserError(f"{folder} is not whole: {', '.join(missing)} is missing; copy the folder again")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in sorted(set(files.values())):
        part, part_metadata = read_file(folder / file)
        tensors |= part
        metadata |= part_metadata
    return tensors, metadata


def tensors_of(state: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name in what a pickle held: a state dict, or one under `state_dict`, or under that again."""
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
        if any(isinstance(value, Tensor) for value in state.values()):  # merges leave an empty one next to the weights
            state = {name: value for name, value in state.items() if name != "state_dict"}
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds no weights by name: expected a state dict, or one under 'state_dict'")
    wrong = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if wrong is not None or not state:
        what = f"{wrong} is a {type(state[wrong]).__name__}" if wrong else "it is empty"
        raise UserError(f"{path} holds no weights by name ({what}): expected a state dict, or one under 'state_dict'")
    return {name: value.detach() for name, value in state.items()}


def write_weights(
    folder: Path,
    name: str,
    tensors: dict[str, Tensor],
    shard_bytes: int = SHARD_bytes,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One safetensors file, or several with an index where they are larger than `shard_bytes` together."""
    metadata = {"format": "pt", **(metadata or {})}
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += size
    if len(shards) == 1:
        save_tensors(folder / f"{name}.safetensors", shards[0], metadata)
        return
    files = [f"{name}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_tensors(folder / file, shard, metadata)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weight_map = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
    write_json(folder / f"{name}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as JSON, its names in order."""
    path.write_text(json.dumps(dict(value), indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the model's folder is not whole") from error
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not what diffusers writes: expected an object")
    return value
