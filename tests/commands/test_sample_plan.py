"""What sample.py plans: literal texts, a file of prompts with their own knobs, axes, the model's own settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm.commands.axes import read_axes
from ldm.commands.init_images import read_init_image
from ldm.commands.png_metadata import Origin, metadata, read_metadata
from ldm.commands.prompts import read_prompts
from ldm.commands.sample_plan import Picture, plan
from ldm.commands.sampling_job import SamplingJob
from ldm.config import trained
from ldm.config.compose import compose
from ldm.config.devices import devices_of
from ldm.config.overrides import quoted, with_texts
from ldm.config.trained import warn_without_dropout
from ldm.errors import UserError
from ldm.generation import save_image
from ldm.sampling.interval import Interval

from .conftest import SAMPLING, model_config

ORIGIN = Origin("/somewhere/model", "0123", "4567", "ema", {"torch": "2"})
MODEL = OmegaConf.create(model_config())


def planned(*overrides: str, recorded: dict[str, Any] | None = None, model: DictConfig = MODEL) -> list[Picture]:
    given = ["out=x", *overrides]
    return plan(compose("sample", given), given, model, recorded)[0]


@pytest.mark.parametrize("text", ["a, b (c) [d]", 'it\'s "x"', "ends \\", "a\\'b", "${x} \\${y}", "=,{}:%@", "42", ""])
def test_a_text_is_taken_letter_by_letter(text: str) -> None:
    assert planned(f"prompt={quoted(text)}")[0].knobs["prompt"] == text


def test_texts_are_quoted_for_hydra_where_they_are_not() -> None:
    given = ["prompt=a, b", "prompt='a, b'", "prompt=null", "prompt=", "steps=1,2", "sheet.x=steps=1,2"]
    wanted = ["prompt='a, b'", "prompt='a, b'", "prompt=null", "prompt=", "steps=1,2", "sheet.x='steps=1,2'"]
    assert with_texts(given, ("prompt", "sheet.x")) == wanted


def test_each_line_of_a_file_has_knobs_of_its_own(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a, ${b}", "seed": 3, "n": 2, "sampler": "dpmpp_2m", "grid": "trailing", "negative_prompt": "it's"},
        {"prompt": "c", "sampler.eta": 0.5, "size": [48, 32], "guidance_scale": 3},
    ]
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    pictures = planned(f"prompts={tmp_path}/p.jsonl", "n=1", "steps=7")
    assert [one.name for one in pictures] == ["00000_seed3.png", "00000_seed4.png", "00001_seed0.png"]
    first, _, last = (one.knobs for one in pictures)
    assert (first["prompt"], first["negative_prompt"], first["steps"]) == ("a, ${b}", "it's", 7)
    assert first["sampler"]["_target_"].endswith("DPMPP2M") and first["grid"]["_target_"].endswith("Trailing")
    assert last["sampler"] == SAMPLING["sampler"] | {"eta": 0.5}  # a knob of the model's own sampler
    assert (last["size"], last["guidance_scale"]) == ([48, 32], 3)
    assert pictures[0].group() == pictures[1].group() != pictures[2].group()
    assert pictures[2].settings().guidance_scale == 3.0
    assert pictures[2].label == "c · seed 0 · sampler.eta 0.5 · size [48, 32] · guidance_scale 3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "step": 3}', "prompt 1: step: there is no such knob; did you mean steps"),
        ('{"prompt": "a", "steps": 0}', "steps=0"),
        ('{"prompt": "a", "steps": "many"}', "steps='many': expected a whole number"),
        ('{"prompt": "a", "checkpoint": "x"}', "checkpoint is a knob of the whole command"),
        ('{"prompt": "a", "n": 0}', "n=0"),
        ('{"prompt": "a", "n": true}', "n=True"),
        ('{"prompt": "a", "sampler": {"eta": 1}}', "NAME.KNOB"),
        ('{"prompt": 3}', "line 1: expected an object"),
        ('{"seed": 3}', "prompt 1: prompt: not given"),
        ("a red circle", "line 1: this is not JSON"),
        ("", "has no prompts"),
    ],
)
def test_a_wrong_line_is_reported_with_its_place(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        planned(f"prompts={tmp_path}/p.jsonl")


def test_a_prompt_or_a_file_is_needed(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a, b\n\n c \n")
    assert read_prompts(tmp_path / "p.txt") == [{"prompt": "a, b"}, {"prompt": "c"}]
    for wrong in ([], ["prompt=a", f"prompts={tmp_path}/p.txt"], [f"prompts={tmp_path}/none.txt"]):
        with pytest.raises(UserError, match="prompt"):
            planned(*wrong)


def test_what_a_model_reads_is_required_and_nothing_else(tmp_path: Path) -> None:
    image = picture(tmp_path / "image.png", (32, 32))
    models = {name: OmegaConf.create(model_config(name)) for name in ("none", "low_resolution", "masked_image")}
    assert [one.label for one in planned("n=2", model=models["none"])] == ["seed 0", "seed 1"]
    assert planned(model=models["masked_image"])[0].knobs["prompt"] is None
    shown = planned(f"init_image={image}", model=models["low_resolution"])[0]
    assert (shown.strength, planned("prompt=x", f"init_image={image}")[0].strength) == (1.0, 0.8)
    for model, given, message in (
        ("none", "prompt=x", "prompt=x: this model reads no text"),
        ("none", "negative_prompt=x", "negative_prompt=x: this model reads no text"),
        ("low_resolution", "seed=1", "init_image: not given"),
    ):
        with pytest.raises(UserError, match=message):
            planned(given, model=models[model])


def test_the_models_own_settings_hold_where_the_command_says_nothing() -> None:
    knobs = planned("prompt=x")[0].knobs
    assert {name: knobs[name] for name in SAMPLING} == SAMPLING
    knobs = planned("prompt=x", "sampler.eta=0.5", "grid=leading", "guidance=interval", "steps=9")[0].knobs
    assert knobs["sampler"] == SAMPLING["sampler"] | {"eta": 0.5}
    assert knobs["grid"] == {"_target_": "ldm.sampling.grid.Leading", "offset": 1}
    assert knobs["guidance"]["_target_"].endswith("Interval")
    assert (knobs["steps"], knobs["guidance_scale"]) == (9, 2.0)
    for given, message in (
        (["sampler.etta=0.5"], r"sampler\.etta: .* did you mean eta"),
        (["sampler=dpmpp_2m", "sampler.eta=1"], "sampler.eta"),
    ):
        with pytest.raises(UserError, match=message):
            planned("prompt=x", *given)


def test_a_model_without_settings_needs_them_on_the_command_line() -> None:
    model = OmegaConf.create({name: node for name, node in model_config().items() if name != "sampling"})
    with pytest.raises(UserError, match=r"give sampler=\S+ grid=\S+ guidance=\S+ steps=\S+ guidance_scale="):
        planned("prompt=x", "sampler.eta=0", model=model)
    given = ["sampler=ddim", "grid=leading", "guidance=classifier_free", "steps=5", "guidance_scale=1"]
    assert planned("prompt=x", *given, model=model)[0].steps == 5


def test_axes_span_every_combination() -> None:
    pictures = planned(
        "prompt=x", "grid=trailing", "sheet.x='guidance_scale=1,3,7.5'",
        "sheet.y='steps=range(10,40,10)'", "sheet.z='sampler=ddim,dpmpp_2m'",
    )  # fmt: skip
    assert [one.cell for one in pictures[:4]] == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 1, 0)]
    assert len(pictures) == 18 and len({one.name for one in pictures}) == 18
    assert {one.knobs["seed"] for one in pictures} == {0}
    last = pictures[-1].knobs
    assert (last["guidance_scale"], last["steps"]) == (7.5, 30)
    assert last["sampler"] == {"_target_": "ldm.sampling.dpmpp_2m.DPMPP2M"}
    assert last["grid"] == {"_target_": "ldm.sampling.grid.Trailing"}


def test_an_axis_may_be_the_time_grid_a_text_or_a_knob_inside() -> None:
    axis = "prompt='a, ${b}',c ${d}"
    grids = planned("prompt=x", "sheet.x='grid=leading,trailing'")
    assert [one.knobs["grid"]["_target_"].split(".")[-1] for one in grids] == ["Leading", "Trailing"]
    texts = planned(f"sheet.y={quoted(axis)}", "n=2")
    assert [one.knobs["prompt"] for one in texts] == ["a, ${b}", "a, ${b}", "c ${d}", "c ${d}"]
    inside = planned("prompt=x", "sheet.x='guidance.factor=0.1,0.9'", "guidance=rescaled")
    assert [one.knobs["guidance"]["factor"] for one in inside] == [0.1, 0.9]
    axes = read_axes({"x": "sampler.eta=0,1", "y": None, "z": None})
    assert (axes.x.labels(), axes.y.labels()) == (["eta 0", "eta 1"], [""])


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("guidance_scal=1,2", "did you mean guidance_scale"),
        ("sampler=ddim,dmp", "there is no such sampler"),
        ("checkpoint=a,b", "of the whole command"),
        ("sheet.y=1,2", "of the whole command"),
        ("steps", "expected a knob and its values"),
        ("steps=0,2", "steps=0"),
        ("strength=0.5,1.5", "give init_image"),
    ],
)
def test_a_wrong_axis_is_reported_before_any_weights_are_read(axis: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned("prompt=x", f"sheet.x='{axis}'")
    with pytest.raises(UserError, match="steps is on two axes"):
        planned("prompt=x", "sheet.x='steps=1,2'", "sheet.y='steps=3,4'")


def test_a_knob_cannot_be_on_an_axis_and_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "steps": 3}')
    with pytest.raises(UserError, match="steps is on an axis"):
        planned(f"prompts={tmp_path}/p.jsonl", "sheet.x='steps=1,2'")


def picture(path: Path, size: tuple[int, int], value: int = 255) -> Path:
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


def test_what_a_model_cannot_make_is_reported_from_its_configuration(tmp_path: Path) -> None:
    assert planned("prompt=x")[0].knobs["size"] == [32, 32]
    assert planned("prompt=x", "size=[48,32]")[0].knobs["size"] == [48, 32]
    for given, message in (
        ("size=[30,32]", "factor 4"),
        ("size=[32,-32]", "size="),
        ("steps=1001", "steps=1001"),
        ("init_image=no.png", "no.png"),
        ("strength=0.5", "strength=0.5: .*init_image"),
    ):
        with pytest.raises(UserError, match=message):
            planned("prompt=x", given)
    image = picture(tmp_path / "image.png", (32, 32))
    with pytest.raises(UserError, match=r"strength=1\.5"):
        planned("prompt=x", f"init_image={image}", "sheet.x='strength=0.5,1.5'")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"init_image=.*corrupt picture"):
        planned("prompt=x", f"init_image={tmp_path}/broken.png")


def test_a_mask_is_brought_to_the_picture_or_refused(tmp_path: Path) -> None:
    image, half = str(picture(tmp_path / "image.png", (64, 32), 51)), np.zeros((32, 16), np.uint8)
    half[:, 8:] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    source = read_init_image(image, str(tmp_path / "half.png"), (64, 32))
    assert source.image is not None and source.mask is not None
    assert (source.image.shape, source.mask.shape) == ((3, 64, 32), (1, 64, 32))
    torch.testing.assert_close(source.image, torch.full((3, 64, 32), 51 / 127.5 - 1))
    assert float(source.mask[:, :, :15].max()) == 0.0 and float(source.mask[:, :, 17:].min()) == 1.0
    assert source.notes == (f"mask={tmp_path}/half.png: 32x16 is resized to the picture's 64x32",)
    assert "cropped to the ratio" in read_init_image(image, None, (32, 32)).notes[0]
    with pytest.raises(UserError, match="ratios differ"):
        read_init_image(image, str(picture(tmp_path / "square.png", (32, 32))), (64, 32))
    with pytest.raises(UserError, match="give init_image"):
        read_init_image(None, image, (64, 32))


def recorded(tmp_path: Path, *overrides: str) -> tuple[Picture, Path]:
    """A planned picture, and a file with its metadata."""
    one = planned(f"prompt={quoted('a, ${b}')}", "seed=5", "n=1", *overrides)[0]
    path = tmp_path / "made.png"
    save_image(torch.zeros(3, 8, 8), path, metadata(one.knobs, ORIGIN))
    return one, path


def test_a_pictures_metadata_make_it_again(tmp_path: Path) -> None:
    image = picture(tmp_path / "image.png", (32, 32))
    given = ("guidance=interval", "sampler.eta=0.5", "guidance_scale=3", f"init_image={image}", "grid=leading")
    one, path = recorded(tmp_path, *given)
    knobs, origin = read_metadata(path)
    assert (knobs, origin) == (one.knobs, ORIGIN)
    (again,) = planned(f"from={path}", recorded=knobs)
    assert again.knobs == one.knobs
    image.write_bytes(image.read_bytes() + b"more")
    with pytest.raises(UserError, match=r"init_image=.*has changed"):
        read_metadata(path)


def test_what_the_command_line_says_replaces_what_was_recorded(tmp_path: Path) -> None:
    one, path = recorded(tmp_path, "guidance=interval", "sampler.eta=0.5", "guidance_scale=3")
    knobs, _ = read_metadata(path)
    more = ["guidance_scale=2.5", "guidance.sigma_low=0.1", "sampler.eta=1", "grid=leading", "n=2"]
    pictures = planned(*more, recorded=knobs)
    assert [one.knobs["seed"] for one in pictures] == [5, 6]
    first = pictures[0].knobs
    assert first["prompt"] == "a, ${b}" and first["sampler"] == one.knobs["sampler"] | {"eta": 1}
    assert first["grid"]["_target_"].endswith("Leading")
    settings = pictures[0].settings()
    assert isinstance(settings.guidance, Interval)
    assert (settings.guidance.sigma_low, settings.guidance.sigma_high, settings.guidance_scale) == (0.1, 5.0, 2.5)
    assert planned("init_image=null", "seed=0", recorded=knobs)[0].knobs["seed"] == 0


def test_a_picture_without_metadata_is_refused(tmp_path: Path) -> None:
    for path, message in (
        (picture(tmp_path / "plain.png", (8, 8)), "does not say how it was made"),
        (tmp_path / "none.png", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_metadata(path)


def test_batches_do_not_depend_on_the_number_of_devices() -> None:
    pictures = planned("prompt=x", "sheet.x='steps=2,3'", "n=5")
    batches = SamplingJob(ORIGIN, (), 2, Path("out")).batches(pictures, "cpu")
    assert [[pictures.index(one) for one in batch] for batch in batches] == [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9]]
    assert sum(one.steps for one in pictures) == 5 * 2 + 5 * 3
    with pytest.raises(UserError, match="devices=4096"):
        devices_of("cpu", 4096)


def test_guidance_without_dropout_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    config = OmegaConf.create(model_config())
    warn_without_dropout(config, [3.0])
    config.model.conditioner.dropout = 0.0
    warn_without_dropout(config, [1.0])
    assert not caplog.text
    warn_without_dropout(config, [1.0, 3.0])
    assert "without caption dropout" in caplog.text
    caplog.clear()
    warn_without_dropout(OmegaConf.create(model_config("none")), [3.0])
    assert "reads no text" in caplog.text


def test_a_command_is_composed_once_and_each_combination_of_settings_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm.commands import sample_plan

    composed: list[list[str]] = []

    def counting(name: str, overrides: list[str]) -> DictConfig:
        composed.append(overrides)
        return compose(name, overrides)

    monkeypatch.setattr(sample_plan, "compose", counting)
    planned("prompt=x", "n=3")
    assert not composed
    (tmp_path / "p.jsonl").write_text("\n".join(f'{{"prompt": "x", "seed": {seed}}}' for seed in range(3)))
    planned(f"prompts={tmp_path}/p.jsonl", "sheet.x='steps=3,4'", "n=1")
    assert len(composed) == 2


def test_the_sizes_of_a_model(tiny_model: Callable[..., Path]) -> None:
    config = trained.open_trained(str(tiny_model()))[1]
    assert (trained.image_size(config, None), trained.image_size(config, 16)) == ((32, 32), (16, 16))
    with pytest.raises(UserError, match="size=big"):
        trained.image_size(config, "big")  # type: ignore[arg-type]
