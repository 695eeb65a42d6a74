"""The model folder: what a finished stage leaves behind, complete and without pickles.

model.json             the record: kind, stage, step, seconds, measurements, hashes of the files
config.yaml            the composed configuration that builds the model
weights.safetensors    the whole model, raw weights
ema.safetensors        the trained parameters' moving average, where one was kept
tokenizer/             the tokenizer, where the model has one of its own
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import fingerprint, load_tensors, save_tensors, sha256, write_folder
from ldm.errors import UserError

RECORD = "model.json"
WEIGHTS = "weights.safetensors"
EMA_WEIGHTS = "ema.safetensors"


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that has been opened: its place and its record."""

    path: Path
    record: dict[str, Any]

    @property
    def config_text(self) -> str:
        """The composed configuration, YAML."""
        return (self.path / "config.yaml").read_text()

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the model's own tokenizer, if it has one."""
        folder = self.path / "tokenizer"
        return folder if folder.is_dir() else None

    def weights(self, which: str = "ema") -> dict[str, Tensor]:
        """The model's state by name: `ema` puts the averages in place where there are any, or `raw`."""
        if which not in ("ema", "raw"):
            raise UserError(f"weights={which}: expected ema or raw")
        state, _ = load_tensors(self.path / WEIGHTS)
        if which == "ema" and (self.path / EMA_WEIGHTS).exists():
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
    """Writes a model folder, all or nothing: it is built beside `path`, synced, and renamed when complete."""
    with write_folder(path) as building:
        save_tensors(building / WEIGHTS, dict(state))
        hashes = {WEIGHTS: sha256(building / WEIGHTS)}
        if average:
            save_tensors(building / EMA_WEIGHTS, dict(average))
            hashes[EMA_WEIGHTS] = sha256(building / EMA_WEIGHTS)
        if tokenizer is not None:
            shutil.copytree(tokenizer, building / "tokenizer")
        (building / "config.yaml").write_text(config_text)
        full = dict(record) | {"format": 1, "fingerprint": fingerprint(dict(state)), "sha256": hashes}
        (building / RECORD).write_text(json.dumps(full, indent=2) + "\n")


def open_model_folder(path: Path, kind: str | None = None) -> ModelFolder:
    """The model folder at `path`; UserError where there is none or where it holds another kind of model."""
    try:
        record = json.loads((path / RECORD).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is no model folder: it has no {RECORD}") from error
    except ValueError as error:
        raise UserError(f"{path / RECORD} is not readable as JSON ({error})") from error
    if kind is not None and record.get("kind") != kind:
        raise UserError(
            f"{path} holds a model of kind {record.get('kind')!r} (stage {record.get('stage')!r}); "
            f"this needs one of kind {kind!r}"
        )
    return ModelFolder(path, record)


def find_model_folder(given: Path, kind: str) -> ModelFolder:
    """The model folder meant by a path: itself, a stage's, a run's (its last stage of the kind), or an
    experiment's (its newest run that has one)."""
    if not given.exists():
        raise UserError(f"checkpoint={given}: nothing is there; give a run's folder, a stage's or a model folder")
    for candidate in (given, given / "model"):
        if (candidate / RECORD).exists():
            return open_model_folder(candidate, kind)
    runs = [given, *sorted((run for run in given.glob("*") if (run / ".hydra").is_dir()), reverse=True)]
    runs = [run for run in runs if any(run.glob(f"*/model/{RECORD}"))][:1]  # itself, or the newest run in it
    found = [open_model_folder(record.parent) for run in runs for record in run.glob(f"*/model/{RECORD}")]
    found = [folder for folder in found if folder.record["kind"] == kind]
    if not found:
        raise UserError(
            f"checkpoint={given}: no finished stage of kind {kind!r} in it; give the folder of a run that has one "
            "(outputs/NAME/TIME), one of its stages, or a model folder"
        )
    return max(found, key=lambda folder: folder.record["order"])


def stage_records(run: Path) -> list[dict[str, Any]]:
    """The records of a run's finished stages, in the order of the curriculum."""
    records = [open_model_folder(path.parent).record for path in run.glob(f"*/model/{RECORD}")]
    return sorted(records, key=lambda record: int(record["order"]))
