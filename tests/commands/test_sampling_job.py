"""The sampling job on tiny models of random weights: every kind of input, again from metadata, nothing overwritten."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.commands.sampling_job import sample
from ldm.config.compose import compose
from ldm.errors import UserError
from ldm.generation import Generator

Model = Callable[..., Path]


def run(model: Path | None, out: Path, *overrides: str) -> str:
    given = [f"out={out}", *([f"checkpoint={model}"] if model else []), *overrides]
    return sample(compose("sample", given), given)


def pictures(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*_seed*.png"))


@pytest.mark.parametrize("kind", [("class", "v"), ("class", "flow"), ("class", "edm"), ("none", "v"),
                                  ("masked_image", "v")])  # fmt: skip
def test_a_model_of_any_kind_samples_with_its_own_settings(
    kind: tuple[str, str], tiny_model: Model, tmp_path: Path
) -> None:
    prompt = ["prompt='2'"] if kind[0] == "class" else []
    text = run(tiny_model(*kind), tmp_path, *prompt, "n=2")
    assert text.splitlines()[-1] == f"2 images and grid.png written to {tmp_path}/"
    assert pictures(tmp_path) == ["00000_seed0.png", "00000_seed1.png"]
    one, other = (np.asarray(Image.open(tmp_path / name)) for name in pictures(tmp_path))
    assert one.shape == (32, 32, 3) and (one != other).any() and one.std() > 0


def test_a_super_resolution_model_follows_its_picture(tiny_model: Model, tmp_path: Path) -> None:
    for value in (0, 255):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / f"{value}.png")
        run(tiny_model("low_resolution"), tmp_path / str(value), f"init_image={tmp_path}/{value}.png", "n=1")
    dark, bright = (np.asarray(Image.open(tmp_path / value / "00000_seed0.png")) for value in ("0", "255"))
    assert (dark != bright).any()


def test_the_prompt_reaches_the_field_that_the_conditioner_reads(tiny_model: Model, tmp_path: Path) -> None:
    run(tiny_model(), tmp_path, "sheet.x='prompt=1,2'", "guidance_scale=1")
    one, other = (np.asarray(Image.open(tmp_path / name)) for name in pictures(tmp_path))
    assert (one != other).any()


def test_a_knob_of_the_models_sampler_changes_the_picture(tiny_model: Model, tmp_path: Path) -> None:
    run(tiny_model(), tmp_path, "prompt='1'", "sheet.x='sampler.eta=0,1'", "sheet.y='guidance_scale=1,3'")
    images = [np.asarray(Image.open(tmp_path / name)) for name in pictures(tmp_path)]
    assert len(images) == 4 == len({image.tobytes() for image in images})


def test_a_picture_is_made_again_from_its_metadata(tiny_model: Model, tmp_path: Path) -> None:
    run(tiny_model(), tmp_path / "one", "prompt='1'", "n=1", "seed=3", "sampler=euler_ancestral", "steps=3",
        "weights=raw")  # fmt: skip
    source = tmp_path / "one" / "00000_seed3.png"
    assert run(None, tmp_path / "two", f"from={source}").startswith(str(tmp_path / "two" / "00000_seed3.png"))
    again = tmp_path / "two" / "00000_seed3.png"
    assert again.read_bytes() == source.read_bytes()
    run(None, tmp_path / "three", f"from={source}", "steps=2", "sampler.eta=0.5")
    facts = json.loads(Image.open(tmp_path / "three" / "00000_seed3.png").text["ldm"])  # type: ignore[attr-defined]
    assert (facts["steps"], facts["sampler"]["eta"], facts["weights"]) == (2, 0.5, "raw")
    with pytest.raises(UserError, match="written over"):
        run(None, tmp_path / "one", f"from={source}", "overwrite=true")
    with pytest.raises(UserError, match="trained again or replaced"):
        run(tiny_model("class", "flow"), tmp_path / "four", f"from={source}")
    with pytest.raises(UserError, match="checkpoint: not given"):
        run(None, tmp_path / "five", "prompt=x")


def test_pictures_of_another_command_are_not_overwritten(tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model()
    run(model, tmp_path, "prompt='1'", "n=2")
    first = (tmp_path / "00000_seed0.png").read_bytes()
    run(model, tmp_path, "prompt='1'", "n=3")  # the same knobs, and one picture more
    for other in (["prompt='2'", "n=3"], ["prompt='1'", "n=3", "steps=2"], ["prompt='1'", "n=2"],
                  ["prompt='1'", "seed=7"], ["prompt='1'", "n=3", "weights=raw"]):  # fmt: skip
        with pytest.raises(UserError, match=f"out={tmp_path}: .*overwrite=true"):
            run(model, tmp_path, *other)
    assert (tmp_path / "00000_seed0.png").read_bytes() == first
    run(model, tmp_path, "prompt='2'", "n=1", "overwrite=true")
    assert (tmp_path / "00000_seed0.png").read_bytes() != first


def test_the_report_lists_eight_paths(tiny_model: Model, tmp_path: Path) -> None:
    lines = run(tiny_model("none"), tmp_path, "n=10", "steps=1").splitlines()
    assert lines[:8] == [str(tmp_path / f"00000_seed{seed}.png") for seed in range(8)]
    assert lines[8:] == ["... and 2 more", f"10 images and grid.png written to {tmp_path}/"]


def test_what_cannot_be_made_is_refused(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, message in (("batch_size=0", "batch_size=0"), ("batch_size=-1", "batch_size=-1"),
                           ("weights=emma", "weights=emma"), ("devices=0", "devices=0")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run(tiny_model("none"), tmp_path, given)
    monkeypatch.setattr(Generator, "generate", lambda *args: iter([torch.full((3, 32, 32), torch.nan)]))
    with pytest.raises(UserError, match=r"00000_seed0\.png: .*NaN"):
        run(tiny_model("none"), tmp_path, "n=1")
    assert not pictures(tmp_path)


def test_a_model_folder_of_an_older_version_is_refused(tiny_model: Model, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for path in tiny_model().iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    config = OmegaConf.load(old / "config.yaml")
    del config["model"]
    OmegaConf.save(config, old / "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml has no model"):
        run(old, tmp_path, "prompt=x")


def test_autoguidance_leads_away_from_a_checkpoint_and_notices_its_change(tiny_model: Model, tmp_path: Path) -> None:
    weaker = tmp_path / "weaker"
    weaker.mkdir()
    for path in tiny_model().iterdir():
        (weaker / path.name).write_bytes(path.read_bytes())
    given = ["prompt='1'", "n=1", "guidance=autoguidance", f"guidance.checkpoint={weaker}"]
    run(tiny_model(), tmp_path / "out", *given)
    source = tmp_path / "out" / "00000_seed0.png"
    run(None, tmp_path / "again", f"from={source}")
    (weaker / "config.yaml").write_text((weaker / "config.yaml").read_text() + "\n")
    with pytest.raises(UserError, match="weaker model"):
        run(None, tmp_path / "later", f"from={source}")
