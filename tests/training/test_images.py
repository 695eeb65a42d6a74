"""Pictures during training: they appear, show the same each time, and training is not affected by them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import Logger
from torch import Tensor

from ldm.checkpoint import load_tensors
from ldm.errors import UserError
from ldm.generation import SamplingSettings
from ldm.sampling.dpmpp_2m import DPMPP2M
from ldm.sampling.grid import Trailing
from ldm.sampling.guidance import ClassifierFree
from ldm.training import diffusion
from ldm.training.diffusion import DiffusionModule
from ldm.training.images import ImageLogger
from ldm.training.loggers import log_image
from ldm.training.module import Preview, TrainingModule
from tests.training.miniature import train

SETTINGS = SamplingSettings(DPMPP2M(), Trailing(), ClassifierFree(), 2, 2.0)
STEPS = "curriculum.{}.trainer.max_steps=3"


@pytest.fixture(scope="module")
def first_stage(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a finished first stage, without pictures."""
    more = ["stages=[first_stage]", STEPS.format("first_stage"), "callbacks.images=null"]
    return train(tiny_shapes, tmp_path_factory.mktemp("off"), *more) / "first_stage"


def weights(stage: Path) -> dict[str, Tensor]:
    """The raw and the averaged weights of a finished stage."""
    raw, average = (load_tensors(stage / "model" / f"{name}.safetensors")[0] for name in ("weights", "ema"))
    return {f"raw {name}": t for name, t in raw.items()} | {f"ema {name}": t for name, t in average.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_first_stage_trains_alike_with_and_without_pictures(
    first_stage: Path, tiny_shapes: Path, tmp_path: Path
) -> None:
    more = ["stages=[first_stage]", STEPS.format("first_stage"), "callbacks.images.every_n_steps=2"]
    seen = train(tiny_shapes, tmp_path, *more) / "first_stage"
    assert sorted(path.name for path in (seen / "images").iterdir()) == ["step_00000002.png", "step_00000003.png"]
    assert not (first_stage / "images").exists()
    assert_same(weights(seen), weights(first_stage))


def test_diffusion_trains_alike_with_and_without_pictures(
    first_stage: Path, tiny_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[Tensor], list[str]]] = []
    states: list[bool] = []
    draw = DiffusionModule.draw_preview

    def watched(self: DiffusionModule, path: Path, batch: Any, preview: Preview) -> bool:
        assert not any(part.training for part in self.modules())
        before = torch.get_rng_state()
        done = draw(self, path, batch, preview)
        states.append(torch.equal(before, torch.get_rng_state()))
        return done

    def noted(images: Sequence[Tensor], labels: Sequence[str], path: Path) -> None:
        drawn.append((list(images), list(labels)))

    monkeypatch.setattr(DiffusionModule, "draw_preview", watched)
    monkeypatch.setattr(diffusion, "labelled_grid", noted)
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

    def note(self: TrainingModule, path: Path, batch: Any, preview: Preview) -> bool:
        found.update({f"ema {name}": p.detach().clone() for name, p in self.trainable_parameters().items()})
        return False

    monkeypatch.setattr(DiffusionModule, "draw_preview", note)
    more = ["stages=[base]", f"first_stage_from={first_stage}", STEPS.format("base")]
    expected = weights(train(tiny_shapes, tmp_path, *more) / "base")
    assert found and all(torch.equal(found[name], expected[name]) for name in found)


def test_prompts_are_used_in_turn_with_a_seed_each() -> None:
    preview = ImageLogger("", SETTINGS, 1, prompts=["a", "b"], n=3, seed=5).preview
    requests = diffusion._preview_requests(None, preview)  # type: ignore[arg-type]
    assert [(request.fields["caption"], request.seed) for request in requests] == [("a", 5), ("b", 6), ("a", 7)]


def test_the_knobs_reach_the_pictures(
    first_stage: Path, tiny_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, number and seed of callbacks.images, sampler, steps and scale of the model's sampling."""
    asked: list[Preview] = []

    def note(self: TrainingModule, path: Path, batch: Any, preview: Preview) -> bool:
        asked.append(preview)
        return False

    monkeypatch.setattr(DiffusionModule, "draw_preview", note)
    train(
        tiny_shapes, tmp_path, "stages=[base]", f"first_stage_from={first_stage}", "sampler=ddim", "sampler.eta=0.5",
        "sampling.steps=7", "sampling.guidance_scale=3.5", "callbacks.images.prompts=[red,blue]",
        "callbacks.images.n=3", "callbacks.images.seed=11",
    )  # fmt: skip
    (preview,) = asked
    assert (list(preview.prompts or []), preview.n, preview.seed) == (["red", "blue"], 3, 11)
    assert (preview.sampling.steps, preview.sampling.guidance_scale) == (7, 3.5)
    assert vars(preview.sampling.sampler) == {"eta": 0.5}


@pytest.mark.parametrize(
    ("knobs", "name"),
    [
        ({"every_n_steps": 0}, "callbacks.images: every_n_steps=0"),
        ({"n": 0}, "callbacks.images: .*n=0"),
        ({"prompts": []}, r"callbacks.images.prompts=\[\]"),
    ],
)
def test_what_makes_no_picture_is_refused(knobs: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        ImageLogger("", SETTINGS, **knobs)


def test_a_picture_can_be_looked_at(tiny_shapes: Path, tmp_path: Path) -> None:
    run = train(tiny_shapes, tmp_path, "stages=[first_stage,base]", "callbacks.images.n=5")
    for stage in ("first_stage", "base"):
        with Image.open(run / stage / "images" / "step_00000002.png") as image:
            assert image.width > 5 * 144


def test_loggers_get_the_picture_in_their_own_way(tmp_path: Path) -> None:
    """Lightning's `log_image`, a SummaryWriter's `add_image`; a logger with neither is left alone."""
    path = tmp_path / "step_00000004.png"
    Image.fromarray(np.full((2, 3, 3), 7, np.uint8)).save(path)
    asked: list[Any] = []

    class Base(Logger):
        name = version = "x"

        def log_hyperparams(self, params: Any) -> None: ...

        def log_metrics(self, metrics: Any, step: Any = None) -> None: ...

    class Images(Base):
        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            asked.append((key, images, step))

    class Writer(Base):
        @property
        def experiment(self) -> Any:
            return self

        def add_image(self, tag: str, image: Any, step: int, dataformats: str) -> None:
            asked.append((tag, image.shape, step, dataformats))

    for logger in (Images(), Writer(), Base()):
        log_image(logger, "images", path, 4)
    assert asked == [("images", [str(path)], 4), ("images", (2, 3, 3), 4, "HWC")]
