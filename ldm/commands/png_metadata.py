"""The metadata of a picture: all knobs and the model, so that it can be made again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256 as sha256_of
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ldm.checkpoint import sha256
from ldm.commands.sample_plan import KNOBS, Knobs, Picture
from ldm.errors import UserError
from ldm.interop.model_folder import ModelFolder, find_model_folder

FILES = ("init_image", "mask")


@dataclass(frozen=True)
class Origin:
    """The model that a picture is made with, and the code."""

    checkpoint: str  # the model folder
    model: str  # its fingerprint
    digest: str  # of all its files
    weights: str
    versions: Mapping[str, str | None]


def origin_of(folder: ModelFolder, weights: str, versions: Mapping[str, str | None]) -> Origin:
    """The origin of the pictures that this model folder makes."""
    return Origin(str(folder.path.resolve()), str(folder.record["fingerprint"]), _digest(folder), weights, versions)


def _digest(folder: ModelFolder) -> str:
    """16 hexadecimal digits of all that a model folder makes pictures with: weights, configuration, tokenizer."""
    files = [path for path in sorted(folder.path.rglob("*")) if path.is_file() and path.suffix != ".safetensors"]
    parts = {str(path.relative_to(folder.path)): sha256(path) for path in files if path.name != "model.json"}
    return sha256_of(json.dumps([folder.record["sha256"], parts], sort_keys=True).encode()).hexdigest()[:16]


def metadata(knobs: Knobs, origin: Origin) -> dict[str, Any]:
    """The metadata of a picture, JSON."""
    files = {name: knobs[name] for name in FILES}
    files = {name: path and {"path": str(Path(path).resolve()), "sha256": sha256(path)} for name, path in files.items()}
    weaker = {path: _digest_at(path) for path in _checkpoints(knobs["guidance"])}
    return knobs | files | asdict(origin) | {"weaker": weaker}


def read_metadata(path: Path) -> tuple[Knobs, Origin]:
    """The knobs and the origin of a picture of sample.py.

    UserError where it has none, or where a file or a weaker model that it was made from has changed.
    """
    facts = _facts(path)
    for weaker, digest in facts["weaker"].items():
        if _digest_at(weaker) != digest:
            raise UserError(f"from={path}: the weaker model of its guidance, {weaker}, has changed since")
    knobs = {name: facts[name] for name in KNOBS}
    for name in FILES:
        file = facts[name]
        if file is not None and (not Path(file["path"]).is_file() or sha256(file["path"]) != file["sha256"]):
            raise UserError(f"from={path}: {name}={file['path']}, which it was made from, is missing or has changed")
        knobs[name] = file and file["path"]
    return knobs, Origin(**{name: facts[name] for name in Origin.__dataclass_fields__})


def _facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"from={path}: there is no such file")
    try:
        with Image.open(path) as image:
            facts = json.loads(getattr(image, "text", {}).get("ldm", "null")) or {}
    except (UnidentifiedImageError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"from={path}: this is not a picture that can be read ({error})") from error
    missing = [name for name in (*KNOBS, *Origin.__dataclass_fields__, "weaker") if name not in facts]
    if missing:
        raise UserError(
            f"from={path}: it does not say how it was made (no {', '.join(missing[:3])} in its text chunk ldm); give a "
            "picture of sample.py as it was written: editors and uploads drop the metadata, and sheets have none"
        )
    return dict(facts)


def require_same_model(path: str, origin: Origin, folder: ModelFolder) -> None:
    """Raise UserError where a model is not the one that the picture was made with."""
    digest = _digest(folder)
    if digest != origin.digest:
        raise UserError(
            f"from={path}: the model at {folder.path} is not the one that it was made with (files {origin.digest}, "
            f"fingerprint {origin.model}; here {digest}, {folder.record['fingerprint']}): it was trained again or "
            "replaced; give checkpoint=... of the model as it was"
        )


def refuse_overwriting(pictures: Sequence[Picture], origin: Origin, out: Path) -> None:
    """Raise UserError where `out` holds pictures of sample.py that other knobs, or another model, made."""
    planned = {out / picture.name: picture for picture in pictures}
    others = [path for path in sorted(out.glob("**/*_seed*.png")) if not _is_same(path, planned.get(path), origin)]
    if others:
        raise UserError(
            f"out={out}: it holds {len(others)} pictures of another command ({others[0].relative_to(out)}, ...); give "
            "another folder, or overwrite=true"
        )


def _is_same(path: Path, picture: Picture | None, origin: Origin) -> bool:
    """Whether a file is what is going to be written there: the same knobs, model and weights."""
    if picture is None:
        return False
    try:
        facts, new = _facts(path), metadata(picture.knobs, origin)
    except UserError:
        return False
    return all(facts[name] == new[name] for name in (*KNOBS, "digest", "weights", "weaker"))


def _checkpoints(guidance: Any) -> Iterator[str]:
    """The models that a guidance's configuration names, at any depth."""
    if isinstance(guidance, dict):
        for name, value in guidance.items():
            yield from [value] if name == "checkpoint" else _checkpoints(value)


def _digest_at(checkpoint: str) -> str:
    return _digest(find_model_folder(Path(checkpoint), "diffusion"))
