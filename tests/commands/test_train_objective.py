"""The objective of a launch: the column that is named, else the task's own, else the training loss."""

import json
from pathlib import Path

import pytest

from ldm.commands.train import _objective


@pytest.mark.parametrize(
    ("column", "own", "shown", "returned"),
    [
        (None, "val/mine", ("val/mine", 0.25), None),  # a custom task's; a sweeper gets what `objective` names alone
        (None, "val/loss", ("val/loss", 0.5), None),
        (None, "val/psnr", ("train/loss", 1.0), None),  # not logged: there was no validation
        ("val/loss", "val/mine", ("val/loss", 0.5), 0.5),
    ],
)
def test_the_tables_column(
    column: str | None, own: str, shown: tuple[str, float], returned: float | None, tmp_path: Path
) -> None:
    stage = tmp_path / "base"
    (stage / "model").mkdir(parents=True)
    record = {"kind": "diffusion", "order": 1, "sha256": {}, "objective": own}
    (stage / "model" / "model.json").write_text(json.dumps(record))
    lines = [{"step": 1, "train/loss": 1.0}, {"step": 1, "val/loss": 0.5, "val/mine": 0.25}]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _objective(stage, column, tmp_path) == returned
    fact = json.loads((tmp_path / "objective.json").read_text())
    assert (fact["column"], fact["value"]) == shown
