"""Sheets of pictures: they appear, show the same each time, and training does not notice them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import load_tensors
from ldm.errors import UserError
from ldm.generation import SamplingSettings
from ldm.sampling.dpmpp_2m import DPMPP2M
from ldm.sampling.grid import Trailing
from ldm.sampling.guidance import ClassifierFree
from ldm.training import images as sheets
from ldm.training.images import ReconstructionSheets, SampleSheets
from ldm.training.module import TrainingModule
from tests.training.miniature import train

SETTINGS = SamplingSettings(DPMPP2M(), Trailing(), ClassifierFree(), 2, 2.0)
STEPS = "curriculum.{}.trainer.max_steps=3"


@pytest.fixture(scope="module")
def first_stage(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a finished first stage, without sheets."""
    more = ["stages=[first_stage]", STEPS.format("first_stage"), "callbacks.images=null"]
    return train(tiny_shapes, tmp_path_factory.mktemp("off"), *more) / "first_stage"


def weights(stage: Path) -> dict[str, Tensor]:
    """The raw and the averaged weights of a finished stage."""
    raw, average = (load_tensors(stage / "model" / f"{name}.safetensors")[0] for name in ("weights", "ema"))
    return {f"raw {name}": t for name, t in raw.items()} | {f"ema {name}": t for name, t in average.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_first_stage_trains_alike_with_and_without_sheets(
    first_stage: Path, tiny_shapes: Path, tmp_path: Path
) -> None:
    more = ["stages=[first_stage]", STEPS.format("first_stage"), "callbacks.images.every_n_steps=2"]
    seen = train(tiny_shapes, tmp_path, *more) / "first_stage"
    assert sorted(path.name for path in (seen / "samples").iterdir()) == ["step_00000002.png", "step_00000003.png"]
    assert not (first_stage / "samples").exists()
    assert_same(weights(seen), weights(first_stage))


def test_diffusion_trains_alike_with_and_without_sheets(
    first_stage: Path, tiny_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[Tensor], list[str]]] = []
    states: list[bool] = []
    draw = SampleSheets.draw

    def watched(self: SampleSheets, module: TrainingModule, datamodule: Any, path: Path) -> None:
        assert not any(part.training for part in module.modules())
        before = torch.get_rng_state()
        draw(self, module, datamodule, path)
        states.append(torch.equal(before, torch.get_rng_state()))

    def noted(images: Sequence[Tensor], labels: Sequence[str], path: Path) -> None:
        drawn.append((list(images), list(labels)))

    monkeypatch.setattr(SampleSheets, "draw", watched)
    monkeypatch.setattr(sheets, "labelled_grid", noted)
    more = ["stages=[base]", f"first_stage_from={first_stage}", STEPS.format("base"), "network.dropout=0.1"]
    off = train(tiny_shapes, tmp_path / "off", *more, "callbacks.images=null") / "base"
    on = train(tiny_shapes, tmp_path / "on", *more, "callbacks.images.every_n_steps=1") / "base"
    assert_same(weights(on), weights(off))
    assert states == [True] * 3
    assert [labels for _, labels in drawn] == [drawn[0][1]] * 3  # the same captions each time
    assert len(set(drawn[0][1])) == 2
    assert not torch.equal(drawn[0][0][0], drawn[2][0][0])  # of a model that has learned meanwhile
    values = [
        {name: value for name, value in json.loads(line).items() if name.startswith("train/")}
        for stage in (on, off)
        for line in (stage / "metrics.jsonl").read_text().splitlines()
    ]
    assert values[: len(values) // 2] == values[len(values) // 2 :]


def test_the_averaged_weights_are_sampled(
    first_stage: Path, tiny_shapes: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    found: dict[str, Tensor] = {}

    def note(self: SampleSheets, module: TrainingModule, datamodule: Any, path: Path) -> None:
        found.update({f"ema {name}": p.detach().clone() for name, p in module.trained().items()})

    monkeypatch.setattr(SampleSheets, "draw", note)
    more = ["stages=[base]", f"first_stage_from={first_stage}", STEPS.format("base")]
    expected = weights(train(tiny_shapes, tmp_path, *more) / "base")
    assert found and all(torch.equal(found[name], expected[name]) for name in found)


def test_given_prompts_are_used_in_turn(tmp_path: Path) -> None:
    callback = SampleSheets(tmp_path, 1, SETTINGS, prompts=["a", "b"], n=3, seed=5)
    requests = callback._requests(None)  # type: ignore[arg-type]
    assert [(request.fields["caption"], request.seed) for request in requests] == [("a", 5), ("b", 6), ("a", 7)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReconstructionSheets(Path(), 0),
        lambda: ReconstructionSheets(Path(), 10, n=0),
        lambda: SampleSheets(Path(), 10, SETTINGS, prompts=[]),
    ],
)
def test_what_makes_no_sheet_is_refused(make: Any) -> None:
    with pytest.raises(UserError, match="samples"):
        make()


def test_a_sheet_can_be_looked_at(tiny_shapes: Path, tmp_path: Path) -> None:
    run = train(tiny_shapes, tmp_path, "stages=[first_stage,base]", "callbacks.images.n=5")
    for stage in ("first_stage", "base"):
        with Image.open(run / stage / "samples" / "step_00000002.png") as image:
            assert image.width > 5 * 144
