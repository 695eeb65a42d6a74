"""Golden losses: every experiment's tiny variant gives the losses in golden.json, step by step.

Three steps of each stage in float64 (float64.py says why), on a few drawn pictures. A change that should not change
training passes as it is. After one that should, record the losses again, and read the difference in git:

    python tests/end_to_end/test_golden.py
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-6  # relative

DRAW = ["-m", "ldm.examples.shapes", "--train", "16", "--val", "4", "--size", "32", "--per-shard", "8"]
STAGES = ["first_stage", "base", "finetune"]
COMMON = [
    "variant=tiny",
    "seed=7",
    "compile=false",
    "trainer.val_check_interval=3",
    "callbacks.progress=null",
    *(f"curriculum.{stage}.trainer.max_steps=3" for stage in STAGES),
]
FLOAT64 = ["trainer.precision=64-true", "callbacks.images=null"]
WARM = ["lr_schedule.num_warmup_steps=1"]
# A UNet's output layer starts at zero, so after three usual steps the loss hardly depends on the rest of the network.
FAST = ["optimizer.lr=0.02", "lr_schedule.num_warmup_steps=0"]
CASES = {
    "quickstart": ["experiment=quickstart", *WARM],
    "emoji": ["experiment=emoji", *WARM],
    "sd1": ["experiment=sd1", *FAST],
    "shapes_relations": ["experiment=shapes_relations", *FAST],
    "vq_flow": [
        "experiment=quickstart",
        *FAST,
        "first_stage=vq_f4",
        "first_stage_loss=vq_lpips_gan",
        "schedule=rectified_flow",
        "prediction=flow",
        "time_density=logit_normal",
        "criterion=huber",
        "loss.stratified=true",
        "loss.offset_noise=0.1",
    ],
}

Losses: TypeAlias = dict[str, dict[str, list[float]]]  # by stage, by column of its metrics.jsonl


def run(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr


def draw(folder: Path) -> Path:
    """Draws the training and validation pictures: folder/train, folder/val."""
    run(*DRAW, str(folder))
    return folder


def overrides(case: str, shapes: Path, out: Path) -> list[str]:
    """The arguments of train.py that train a case on the pictures in `shapes`, with the run folder `out`."""
    shards = [f"data.train.shards={shapes}/train", f"data.val.shards={shapes}/val"]
    return [*CASES[case], *COMMON, *shards, f"hydra.run.dir={out}"]


def losses(out: Path) -> Losses:
    """The columns of each stage's metrics.jsonl that are a function of weights and data."""
    columns: Losses = {stage: {} for stage in STAGES}
    for stage, values in columns.items():
        for line in (out / stage / "metrics.jsonl").read_text().splitlines():
            for name, value in json.loads(line).items():
                if name.startswith(("train/", "val/")):
                    values.setdefault(name, []).append(value)
    return columns


def train(case: str, shapes: Path, out: Path) -> Losses:
    """The losses of a case in float64."""
    run("tests/end_to_end/float64.py", "train.py", *overrides(case, shapes, out), *FLOAT64)
    return losses(out)


def flat(columns: Losses) -> dict[str, Any]:
    """ "base train/loss, value 1" and so on, in the order of training."""
    return {
        f"{stage} {name}, value {i}": value
        for stage, values in columns.items()
        for name, column in values.items()
        for i, value in enumerate(column, 1)
    }


def difference(golden: Losses, actual: Losses) -> str | None:
    """A line on the first value that is not the golden one; None where all are."""
    wanted, found = flat(golden), flat(actual)
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        a, b = wanted.get(name), found.get(name)
        if a is None or b is None or not math.isclose(a, b, rel_tol=TOLERANCE):
            return f"{name}: {b}, golden is {a}"
    return None


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("golden") / "shapes")


def test_every_experiment_is_recorded() -> None:
    experiments = {path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")}
    assert experiments <= CASES.keys() == json.loads(GOLDEN.read_text()).keys()


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_the_golden_ones(case: str, shapes: Path, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    first = difference(golden[case], train(case, shapes, tmp_path / "run"))
    assert first is None, first


def record() -> None:
    """Writes golden.json with the losses of the code as it is."""
    with tempfile.TemporaryDirectory() as folder:
        shapes = draw(Path(folder) / "shapes")
        golden = {case: train(case, shapes, Path(folder) / case) for case in CASES}
    lines = json.dumps(golden, indent=1, allow_nan=False)
    GOLDEN.write_text(lines + "\n")


if __name__ == "__main__":
    record()
