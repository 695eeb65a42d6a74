"""A picture's metadata: what it was made of and from, and how it is read again."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256 as hashed
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ldm.checkpoint import sha256
from ldm.commands.sample_plan import KNOBS, Knobs, Place, Planned
from ldm.errors import UserError
from ldm.interop.model_folder import ModelFolder, find_model_folder

FILES = ("init_image", "mask")


@dataclass(frozen=True)
class Origin:
    """The model that a picture was made with, and the code."""

    checkpoint: str  # the model folder
    model: str  # its fingerprint
    digest: str  # of all its files
    weights: str
    versions: Mapping[str, str | None]


@dataclass(frozen=True)
class Recorded:
    """What a picture's metadata say."""

    knobs: Knobs
    origin: Origin
    place: Place


def origin_of(folder: ModelFolder, weights: str, versions: Mapping[str, str | None]) -> Origin:
    """The origin of what is made with this model folder now."""
    fingerprint = str(folder.record["fingerprint"])
    return Origin(str(folder.path.resolve()), fingerprint, digest(folder), weights, versions)


def digest(folder: ModelFolder) -> str:
    """16 hexadecimal digits of all that a model folder makes pictures with: weights, configuration, tokenizer."""
    files = [path for path in sorted(folder.path.rglob("*")) if path.is_file() and path.suffix != ".safetensors"]
    parts = {str(path.relative_to(folder.path)): sha256(path) for path in files if path.name != "model.json"}
    return hashed(json.dumps([folder.record["sha256"], parts], sort_keys=True).encode()).hexdigest()[:16]


def facts_of(knobs: Knobs, origin: Origin, place: Place) -> dict[str, Any]:
    """A picture's metadata, JSON: enough to make it again."""
    files = {name: _named(knobs[name]) for name in FILES}
    weaker = {path: _digest_at(path) for path in _checkpoints(knobs["guidance"])}
    return knobs | files | asdict(origin) | {"batch": asdict(place), "weaker": weaker}


def read_facts(path: Path) -> Recorded:
    """The metadata of a picture; UserError where there are none, or a file that it was made from has changed."""
    if not path.is_file():
        raise UserError(f"from={path}: there is no such file")
    try:
        with Image.open(path) as image:
            facts = json.loads(getattr(image, "text", {}).get("ldm", "null"))
    except (UnidentifiedImageError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"from={path}: no picture that can be read ({error})") from error
    needed = (*KNOBS, *Origin.__dataclass_fields__, "batch")
    lacking = [name for name in needed if name not in (facts or {})]
    if lacking:
        raise UserError(
            f"from={path}: it does not say how it was made (no {', '.join(lacking[:3])} in its text chunk ldm); give a "
            "picture of sample.py as it was written: editors and uploads leave the metadata out, and sheets have none"
        )
    for weaker, was in facts.get("weaker", {}).items():
        if _digest_at(weaker) != was:
            raise UserError(
                f"from={path}: the weaker model at {weaker}, which guidance led away from, has changed since"
            )
    knobs = {name: facts[name] for name in KNOBS} | {name: _found(path, name, facts[name]) for name in FILES}
    origin = Origin(**{name: facts[name] for name in Origin.__dataclass_fields__})
    return Recorded(knobs, origin, Place(**facts["batch"]))


def require_same_model(path: str, origin: Origin, folder: ModelFolder) -> None:
    """Raises UserError where a model is not the one that the picture was made with."""
    now = digest(folder)
    if now != origin.digest:
        raise UserError(
            f"from={path}: the model at {folder.path} is not the one that it was made with (files {origin.digest}, "
            f"fingerprint {origin.model}; here {now}, {folder.record['fingerprint']}): it was trained again or "
            "replaced; give checkpoint=... of the model as it was"
        )


def again(planned: list[Planned], recorded: Recorded, weights: str, picture: Path) -> list[Planned]:
    """The plan, where it is that picture and nothing else, at the place where it was made and with its name."""
    if len(planned) != 1 or planned[0].knobs != recorded.knobs or weights != recorded.origin.weights:
        return planned
    return [replace(planned[0], name=picture.name, place=recorded.place)]


def compare(one: Path, other: Path) -> str:
    """In words, how far two pictures are the same."""
    with Image.open(one) as a, Image.open(other) as b:
        first, second = np.asarray(a.convert("RGB")).astype(int), np.asarray(b.convert("RGB")).astype(int)
    if first.shape != second.shape:
        return "of another size"
    apart = np.abs(first - second)
    if not apart.any():
        return "the same, bit for bit"
    return (
        f"{int((apart.max(axis=2) > 0).sum())} of {apart[..., 0].size} pixels differ, by {apart.max()} of 255 at most"
    )


def _checkpoints(guidance: Any) -> Iterator[str]:
    """The models that a guidance's configuration names, at any depth."""
    if isinstance(guidance, dict):
        for name, value in guidance.items():
            yield from [value] if name == "checkpoint" else _checkpoints(value)


@cache
def _digest_at(checkpoint: str) -> str:
    return digest(find_model_folder(Path(checkpoint), "diffusion"))


def _named(path: str | None) -> dict[str, str] | None:
    return None if path is None else {"path": str(Path(path).resolve()), "sha256": sha256(path)}


def _found(picture: Path, name: str, recorded: Mapping[str, str] | None) -> str | None:
    if recorded is None:
        return None
    path = recorded["path"]
    if not Path(path).is_file() or sha256(path) != recorded["sha256"]:
        raise UserError(f"from={picture}: {name}={path}, which it was made from, is not there any more or has changed")
    return path
