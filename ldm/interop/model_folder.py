"""The model folder: what a finished stage leaves behind, complete and without pickles.

model.json             the record: kind, stage, step, seconds, measurements, hashes of the files
config.yaml            the stage's configuration; `model` builds the model, `sampling` says how it is sampled
weights.safetensors    the whole model, raw weights
ema.safetensors        the trained parameters' moving average, where one was kept
tokenizer/             the tokenizer, where the model has its own
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import fingerprint, load_tensors, save_tensors, sha256, write_folder
from ldm.errors import UserError

RECORD = "model.json"
WEIGHTS = "weights.safetensors"
EMA_WEIGHTS = "ema.safetensors"
CONFIG = "config.yaml"


class NoModelError(UserError):
    """There is no model of the wanted kind at a path."""


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that has been opened: its place and its record."""

    path: Path
    record: dict[str, Any]

    @property
    def config_text(self) -> str:
        """The composed configuration, YAML."""
        if not (self.path / CONFIG).is_file():
            raise UserError(f"{self.path} is damaged: it has no {CONFIG}; copy it again")
        return (self.path / CONFIG).read_text()

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the model's own tokenizer, if it has one."""
        folder = self.path / "tokenizer"
        return folder if folder.is_dir() else None

    @property
    def averaged(self) -> bool:
        """Whether there are averages in addition to the raw weights."""
        return (self.path / EMA_WEIGHTS).exists()

    def weights(self, which: str = "ema") -> dict[str, Tensor]:
        """The model's state by name: `ema` puts the averages in place where there are any, or `raw`."""
        if which not in ("ema", "raw"):
            raise UserError(f"weights={which}: expected ema or raw")
        state, _ = load_tensors(self.path / WEIGHTS)
        if which == "ema" and self.averaged:
            state |= load_tensors(self.path / EMA_WEIGHTS)[0]
        return state

    def verify(self) -> None:
        """Raises UserError where a file's bytes are not those that were written."""
        for name, expected in self.record["sha256"].items():
            if sha256(self.path / name) != expected:
                raise UserError(f"{self.path / name} is damaged: its SHA-256 is not the recorded one; copy it again")


def write_model_folder(
    path: Path,
    record: Mapping[str, Any],
    config_text: str,
    state: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    tokenizer: Path | None,
) -> None:
    """Writes a model folder, all or nothing: it is built next to `path`, synced, and renamed when complete."""
    with write_folder(path) as building:
        save_tensors(building / WEIGHTS, dict(state))
        hashes = {WEIGHTS: sha256(building / WEIGHTS)}
        if average:
            save_tensors(building / EMA_WEIGHTS, dict(average))
            hashes[EMA_WEIGHTS] = sha256(building / EMA_WEIGHTS)
        if tokenizer is not None:
            shutil.copytree(tokenizer, building / "tokenizer")
        (building / CONFIG).write_text(config_text)
        full = dict(record) | {"format": 1, "fingerprint": fingerprint(dict(state)), "sha256": hashes}
        (building / RECORD).write_text(json.dumps(full, indent=2) + "\n")


def open_model_folder(path: Path, kind: str | None = None) -> ModelFolder:
    """The model folder at `path`; UserError where there is none or where it holds another kind of model."""
    try:
        record = json.loads((path / RECORD).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is not a model folder: it has no {RECORD}") from error
    except ValueError as error:
        raise UserError(f"{path / RECORD} is not readable as JSON ({error})") from error
    if not isinstance(record, dict) or not {"kind", "order", "sha256"} <= record.keys():
        raise UserError(f"{path / RECORD} is not the record of a model folder: it needs kind, order and sha256")
    if kind is not None and record.get("kind") != kind:
        raise UserError(
            f"{path} holds a model of kind {record.get('kind')!r} (stage {record.get('stage')!r}); "
            f"this needs one of kind {kind!r}"
        )
    return ModelFolder(path, record)


def find_model_folder(path: Path, kind: str) -> ModelFolder:
    """The model folder meant by a path: itself, a stage's, a run's (its last stage of the kind), or an
    experiment's (its newest run that has one)."""
    if not path.exists():
        raise UserError(f"checkpoint={path}: nothing is there; give a run's folder, a stage's or a model folder")
    for candidate in (path, path / "model"):
        if (candidate / RECORD).exists():
            return open_model_folder(candidate, kind)
    runs = [path, *sorted((run for run in path.glob("*") if (run / ".hydra").is_dir()), reverse=True)]
    runs = [run for run in runs if any(run.glob(f"*/model/{RECORD}"))][:1]  # itself, or the newest run in it
    folders = [open_model_folder(record.parent) for run in runs for record in run.glob(f"*/model/{RECORD}")]
    folders = [folder for folder in folders if folder.record["kind"] == kind]
    if path.is_file() and (path.parent / RECORD).is_file():
        raise NoModelError(f"checkpoint={path}: it is a part of the model folder {path.parent}; give the folder")
    if not folders and (path.is_file() or (path / "model_index.json").is_file()):
        raise NoModelError(
            f"checkpoint={path}: it is a model of another format; convert it first (python -m ldm.interop.convert "
            f"{path} OUT --to ldm) and give OUT"
        )
    if not folders:
        raise NoModelError(
            f"checkpoint={path}: no finished stage of kind {kind!r} in it; give the folder of a run that has one "
            "(outputs/NAME/TIME), one of its stages, or a model folder"
        )
    return max(folders, key=lambda folder: folder.record["order"])


def find_any_model_folder(path: Path) -> ModelFolder:
    """The model folder meant by a path: of a run, its last diffusion model, else its first stage.

    UserError where there is neither.
    """
    for candidate in (path, path / "model"):
        if (candidate / RECORD).exists():
            return open_model_folder(candidate)
    for kind in ("diffusion", "first_stage"):
        with suppress(NoModelError):
            return find_model_folder(path, kind)
    step = " It is a checkpoint to resume from, which leaves out what is frozen: give the finished stage's folder."
    raise UserError(
        f"{path} holds no model that is known here: no model_index.json or config.json (diffusers), no model.json "
        "(a model folder of this project), and no finished stage (a run). Of a folder with a single file in it give "
        f"the file.{step if (path / 'checkpoint.json').is_file() else ''}"
    )


def stage_records(run: Path) -> list[dict[str, Any]]:
    """The records of a run's finished stages, in the order of the curriculum."""
    records = [open_model_folder(path.parent).record for path in run.glob(f"*/model/{RECORD}")]
    return sorted(records, key=lambda record: int(record["order"]))
