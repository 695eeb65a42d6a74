"""What sample.py plans: texts as they stand, a file of prompts with knobs of its own, axes, the same picture again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.commands.axes import axes_of
from ldm.commands.init_images import read_source
from ldm.commands.png_metadata import Origin, again, facts_of, read_facts
from ldm.commands.prompts import read_prompts
from ldm.commands.sample_plan import Place, Planned, Variants, fitted, plan, settings_of
from ldm.commands.sampling_job import Production
from ldm.config.build import warn_without_dropout
from ldm.config.compose import compose, quoted, with_texts
from ldm.config.devices import devices_of
from ldm.errors import UserError
from ldm.generation import save_image
from ldm.sampling.interval import Interval

ORIGIN = Origin("/somewhere/model", "0123", "4567", "ema", {"torch": "2"})


def planned(*overrides: str, recorded: dict[str, object] | None = None) -> list[Planned]:
    given = ["out=x", *overrides]
    return plan(compose("sample", given), given, recorded)[0]


@pytest.mark.parametrize("text", ["a, b (c) [d]", 'it\'s "x"', "ends \\", "a\\'b", "${x} \\${y}", "=,{}:%@", "42", ""])
def test_a_text_is_taken_letter_by_letter(text: str) -> None:
    assert compose("sample", [f"prompt={quoted(text)}", "out=x"]).prompt == text


def test_texts_are_quoted_for_hydra_where_they_are_not() -> None:
    given = ["prompt=a, b", "prompt='a, b'", "prompt=null", "prompt=", "steps=1,2", "grid.x=steps=1,2"]
    wanted = ["prompt='a, b'", "prompt='a, b'", "prompt=null", "prompt=", "steps=1,2", "grid.x='steps=1,2'"]
    assert with_texts(given, ("prompt", "grid.x")) == wanted


def test_each_line_of_a_file_has_knobs_of_its_own(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a, b", "seed": 3, "n": 2, "sampler": "dpmpp_2m", "grid": "trailing", "negative_prompt": "it's"},
        {"prompt": "c", "sampler.eta": 0.5, "size": [48, 32], "guidance_scale": 2},
    ]
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    found = planned(f"prompts={tmp_path}/p.jsonl", "n=1", "steps=7")
    assert [one.name for one in found] == ["00000_seed3.png", "00000_seed4.png", "00001_seed0.png"]
    first, _, last = (one.knobs for one in found)
    assert (first["prompt"], first["negative_prompt"], first["steps"]) == ("a, b", "it's", 7)
    assert first["sampler"]["_target_"].endswith("DPMPP2M") and first["grid"]["_target_"].endswith("Trailing")
    assert (last["sampler"]["eta"], last["size"], last["guidance_scale"]) == (0.5, [48, 32], 2)
    assert found[0].group() == found[1].group() != found[2].group()
    assert settings_of(last).guidance_scale == 2.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "step": 3}', "prompt 1: step: there is no such knob; did you mean steps"),
        ('{"prompt": "a", "steps": 0}', "steps=0"),
        ('{"prompt": "a", "steps": "many"}', "steps='many': expected a whole number"),
        ('{"prompt": "a", "checkpoint": "x"}', "checkpoint is of the whole command"),
        ('{"prompt": "a", "n": 0}', "n=0"),
        ('{"prompt": "a", "sampler": {"eta": 1}}', "NAME.KNOB"),
        ('{"prompt": 3}', "line 1: expected an object"),
        ("a red circle", "line 1: this is no JSON"),
        ("", "has no prompts"),
    ],
)
def test_a_wrong_line_is_told_with_its_place(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        planned(f"prompts={tmp_path}/p.jsonl")


def test_a_prompt_or_a_file_is_needed(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a, b\n\n c \n")
    assert read_prompts(None, str(tmp_path / "p.txt")) == [{"prompt": "a, b"}, {"prompt": "c"}]
    for wrong in ((None, None), ("a", "b"), (None, str(tmp_path / "none.txt"))):
        with pytest.raises(UserError, match="prompt"):
            read_prompts(*wrong)


def test_axes_span_every_combination_and_leave_the_time_grid_in_place() -> None:
    found = planned(
        "prompt=x", "grid=trailing", "grid.x='guidance_scale=1,3,7.5'",
        "grid.y='steps=range(10,40,10)'", "grid.z='sampler=ddim,dpmpp_2m'",
    )  # fmt: skip
    assert [one.cell for one in found[:4]] == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 1, 0)]
    assert len(found) == 18 and len({one.name for one in found}) == 18
    assert {one.knobs["seed"] for one in found} == {0}
    last = found[-1].knobs
    assert (last["guidance_scale"], last["steps"]) == (7.5, 30)
    assert last["sampler"] == {"_target_": "ldm.sampling.dpmpp_2m.DPMPP2M"}
    assert last["grid"] == {"_target_": "ldm.sampling.grid.Trailing"}


def test_an_axis_may_be_the_time_grid_a_text_or_a_knob_inside() -> None:
    grids = planned("prompt=x", "grid.x='grid=leading,trailing'")
    assert [one.knobs["grid"]["_target_"].split(".")[-1] for one in grids] == ["Leading", "Trailing"]
    texts = planned("grid.y=\"prompt='a, b',c d\"", "n=2")
    assert [one.knobs["prompt"] for one in texts] == ["a, b", "a, b", "c d", "c d"]
    inside = planned("prompt=x", "grid.x='guidance.factor=0.1,0.9'", "guidance=rescaled")
    assert [one.knobs["guidance"]["factor"] for one in inside] == [0.1, 0.9]
    axes = axes_of(OmegaConf.create({"x": "sampler.eta=0,1", "y": None, "z": None}))
    assert (axes.x.labels(), axes.y.labels()) == (["eta 0", "eta 1"], [""])


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("guidance_scal=1,2", "did you mean guidance_scale"),
        ("sampler=ddim,dmp", "there is no such sampler"),
        ("checkpoint=a,b", "of the whole command"),
        ("grid.y=1,2", "of the whole command"),
        ("steps", "expected a knob and its values"),
        ("steps=0,2", "steps=0"),
        ("strength=0.5,1.5", "strength=1.5"),
    ],
)
def test_a_wrong_axis_is_told_before_any_model(axis: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned("prompt=x", f"grid.x='{axis}'")
    with pytest.raises(UserError, match="steps is on two axes"):
        planned("prompt=x", "grid.x='steps=1,2'", "grid.y='steps=3,4'")


MODEL = """
data: {size: 32}
tasks: {diffusion: {latent_diffusion: {
  denoiser: {schedule: {_target_: ldm.diffusion.schedule.ScaledLinear}},
  conditioner: {_target_: x, conditioners: [{_target_: y, dropout: 0.0}]},
  first_stage: {
    _target_: ldm.first_stage.autoencoder.FirstStage, latent_channels: 4,
    encoder: {_target_: ldm.networks.autoencoder.Encoder, in_channels: 3, channels: 8, channel_mult: [1, 1, 1],
              num_res_blocks: 1, out_channels: 8, groups: 4},
    regularizer: {_target_: ldm.first_stage.regularizer.KLRegularizer},
    decoder: {_target_: ldm.networks.autoencoder.Decoder, in_channels: 4, channels: 8, channel_mult: [1, 1, 1],
              num_res_blocks: 1, out_channels: 3, groups: 4}}}}}
"""


def picture(path: Path, size: tuple[int, int], value: int = 255) -> Path:
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


def test_what_a_model_cannot_make_is_told_from_its_configuration(tmp_path: Path) -> None:
    config = OmegaConf.create(MODEL)
    assert fitted(planned("prompt=x"), config)[0].knobs["size"] == [32, 32]
    assert fitted(planned("prompt=x", "size=[48,32]"), config)[0].knobs["size"] == [48, 32]
    for given, message in (("size=[30,32]", "factor 4"), ("steps=1001", "steps=1001"), ("init_image=no.png", "no.png")):
        with pytest.raises(UserError, match=message):
            fitted(planned("prompt=x", given), config)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"init_image=.*corrupt picture"):
        fitted(planned("prompt=x", f"init_image={tmp_path}/broken.png"), config)


def test_a_mask_is_brought_to_the_picture_or_refused(tmp_path: Path) -> None:
    image, half = str(picture(tmp_path / "image.png", (64, 32), 51)), np.zeros((32, 16), np.uint8)
    half[:, 8:] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    source = read_source(image, str(tmp_path / "half.png"), (64, 32))
    assert source.image is not None and source.mask is not None
    assert (source.image.shape, source.mask.shape) == ((3, 64, 32), (1, 64, 32))
    torch.testing.assert_close(source.image, torch.full((3, 64, 32), 51 / 127.5 - 1))
    assert float(source.mask[:, :, :15].max()) == 0.0 and float(source.mask[:, :, 17:].min()) == 1.0
    assert source.notes == (f"mask={tmp_path}/half.png: 32x16 is resized to the picture's 64x32",)
    assert "cropped to the ratio" in read_source(image, None, (32, 32)).notes[0]
    with pytest.raises(UserError, match="ratios differ"):
        read_source(image, str(picture(tmp_path / "square.png", (32, 32))), (64, 32))
    with pytest.raises(UserError, match="give init_image"):
        read_source(None, image, (64, 32))


def recorded(tmp_path: Path, *overrides: str) -> tuple[Planned, Path]:
    """A planned picture, and a file with its metadata."""
    one = fitted(planned(f"prompt={quoted('a, ${b}')}", "seed=5", "n=1", *overrides), OmegaConf.create(MODEL))[0]
    path = tmp_path / "made.png"
    save_image(torch.zeros(3, 8, 8), path, facts_of(one.knobs, ORIGIN, Place(4, 2, 1)))
    return one, path


def test_a_pictures_metadata_make_it_again_at_its_place(tmp_path: Path) -> None:
    image = picture(tmp_path / "image.png", (32, 32))
    given = ("guidance=interval", "sampler.eta=0.5", "guidance_scale=3", f"init_image={image}", "grid=trailing")
    one, path = recorded(tmp_path, *given)
    facts = read_facts(path)
    assert (facts.knobs, facts.origin, facts.place) == (one.knobs, ORIGIN, Place(4, 2, 1))
    plain = fitted(planned(f"from={path}", recorded=facts.knobs), OmegaConf.create(MODEL))
    (found,) = again(plain, facts, "ema", path)
    assert (found.knobs, found.place, found.name) == (one.knobs, Place(4, 2, 1), "made.png")
    assert again(plain, facts, "raw", path)[0].place is None
    image.write_bytes(image.read_bytes() + b"more")
    with pytest.raises(UserError, match=r"init_image=.*has changed"):
        read_facts(path)


def test_what_the_command_line_says_replaces_what_was_recorded(tmp_path: Path) -> None:
    one, path = recorded(tmp_path, "guidance=interval", "sampler.eta=0.5", "guidance_scale=3")
    facts = read_facts(path)
    more = ["guidance_scale=2", "guidance=interval", "guidance.sigma_low=0.1", "sampler.eta=1", "grid=trailing", "n=2"]
    found = [o.knobs for o in fitted(planned(*more, recorded=facts.knobs), OmegaConf.create(MODEL))]
    assert [knobs["seed"] for knobs in found] == [5, 6]
    assert found[0]["prompt"] == "a, ${b}" and found[0]["sampler"] == one.knobs["sampler"] | {"eta": 1}
    assert found[0]["grid"]["_target_"].endswith("Trailing")
    settings = settings_of(found[0])
    guidance = settings.guidance
    assert isinstance(guidance, Interval) and (guidance.sigma_low, guidance.sigma_high) == (0.1, 5.0)
    assert settings.guidance_scale == 2.0


def test_a_picture_without_metadata_is_refused(tmp_path: Path) -> None:
    for path, message in (
        (picture(tmp_path / "plain.png", (8, 8)), "does not say how it was made"),
        (tmp_path / "none.png", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_facts(path)


def test_batches_do_not_depend_on_the_number_of_devices() -> None:
    found = fitted(planned("prompt=x", "grid.x='steps=2,3'", "n=5"), OmegaConf.create(MODEL))
    batches = Production(found, ORIGIN, "cpu", 2, Path("out")).batches()
    assert batches == [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9]]
    assert Production(found, ORIGIN, "cpu", 2, Path("out")).steps() == 5 * 2 + 5 * 3
    with pytest.raises(UserError, match="devices=4096"):
        devices_of("cpu", 4096)


def test_guidance_without_dropout_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    config = OmegaConf.create(MODEL)
    warn_without_dropout(config, [1.0])
    assert not caplog.text
    warn_without_dropout(config, [1.0, 3.0])
    assert "without caption dropout" in caplog.text
    caplog.clear()
    config.tasks.diffusion.latent_diffusion.conditioner.conditioners[0].dropout = 0.1
    warn_without_dropout(config, [3.0])
    assert not caplog.text


def test_settings_are_composed_once_for_each_combination() -> None:
    variants = Variants(["out=x"])
    for seed in range(3):
        variants.knobs({"prompt": "x", "seed": seed, "steps": "3"})
    assert len(variants._composed) == 1
