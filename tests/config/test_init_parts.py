"""Which parts of a model come from init_from, and which from what is named beside it."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoint import load_tensors, save_tensors
from ldm.config.compose import compose
from ldm.config.sources import load_first_stage
from ldm.config.stages import stage_config
from ldm.errors import UserError
from ldm.interop import nodes
from ldm.interop.convert import read
from ldm.interop.own_folder import write_own
from ldm.interop.package import Package
from ldm.interop.single_file import write_single_file

from .launch import model_of, overrides_for

NO_OTHER = "first_stage_from=null"  # the first stage is the one in init_from


@pytest.fixture(scope="module")
def other(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder of the run's sizes with other weights."""
    folder = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(run / "diffusers" / "text_encoder", folder)
    tensors, metadata = load_tensors(folder / "model.safetensors")
    save_tensors(folder / "model.safetensors", {name: tensor + 0.5 for name, tensor in tensors.items()}, metadata)
    return folder


def named(run: Path, other: Path) -> list[str]:
    """A text encoder of the file's sizes and other weights, named on the command line."""
    return [
        "conditioner=clip_l",
        f"conditioner.encoder.name_or_path={other}",
        f"conditioner.tokenizer.name_or_path={run}/diffusers/tokenizer",
        "conditioner.max_length=16",
    ]


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def equal(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    assert given.keys() == wanted.keys() and given
    return all(torch.equal(given[name], wanted[name]) for name in given)


def test_a_text_encoder_that_is_named_stays_and_it_is_told(
    run: Path, other: Path, tiny_shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = read(run / "base").state
    given = [f"init_from={run}/base.safetensors", f"first_stage_from={run}/first_stage", *named(run, other)]
    with caplog.at_level(logging.INFO):
        model = model_of(tiny_shapes, run, tmp_path, *given)
    theirs, _ = load_tensors(other / "model.safetensors")
    found = {f"text_model.{n.removeprefix('encoder.')}": t for n, t in model.conditioner.state_dict().items()}
    assert equal(found, theirs)
    assert equal(part(dict(model.state_dict()), "denoiser."), part(wanted, "denoiser."))
    assert "conditioner: its weights are as configured, not those of" in caplog.text
    assert f"network: from {run}/base.safetensors (init_from)" in caplog.text
    assert f"first_stage: from {run}/first_stage/model (first_stage_from)" in caplog.text
    assert model.conditioner.encoder.name_or_path == str(other)  # type: ignore[union-attr]
    assert "origin" not in model.conditioner.__dict__ and "origin" in model.denoiser.network.__dict__

    caplog.clear()
    model = model_of(tiny_shapes, run, tmp_path / "again", *given, "init_parts=[network,conditioner]")
    assert equal(part(dict(model.state_dict()), "conditioner."), part(wanted, "conditioner."))
    assert "as configured" not in caplog.text


def test_parts_are_chosen(run: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    wanted = read(run / "base").state
    from_file = f"init_from={run}/base.safetensors"
    model = model_of(tiny_shapes, run, tmp_path / "all", from_file, NO_OTHER)
    assert equal(dict(model.state_dict()), wanted)
    first_stage = f"first_stage_from={run}/first_stage"
    model = model_of(tiny_shapes, run, tmp_path / "one", from_file, first_stage, "init_parts=[conditioner.encoder]")
    assert equal(part(dict(model.state_dict()), "conditioner."), part(wanted, "conditioner."))
    assert not equal(part(dict(model.state_dict()), "denoiser."), part(wanted, "denoiser."))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["init_parts=[unet]", NO_OTHER], "there is no part 'unet'; "),
        (["init_parts=[network]", NO_OTHER], "neither names the first stage; one of the two has to"),
        (["init_parts=[network,first_stage]", "FIRST"], "both name a first stage; one of the two has to"),
        (["init_parts=[network,conditioner.projection]", "FIRST"], "has no weights of 'conditioner.projection'"),
        (["init_parts=[network]", "init_from=null", NO_OTHER], "the parts that a second stage takes from init_from"),
    ],
)
def test_parts_that_leave_something_open_are_refused(
    given: list[str], message: str, run: Path, tiny_shapes: Path, tmp_path: Path
) -> None:
    first_stage = f"first_stage_from={run}/first_stage"
    more = [first_stage if text == "FIRST" else text for text in given]
    with pytest.raises(UserError, match=message):
        model_of(tiny_shapes, run, tmp_path, f"init_from={run}/base.safetensors", *more)


@pytest.mark.parametrize("source", ["base", "base.safetensors"])
def test_a_text_encoder_of_another_vocabulary_is_refused(
    source: str, run: Path, tiny_shapes: Path, tmp_path: Path
) -> None:
    """As many words with other numbers have the same shapes."""
    shutil.copytree(run / "tokenizer", tmp_path / "tokenizer")
    for name in ("tokenizer.json", "vocab.json"):
        file = tmp_path / "tokenizer" / name
        if file.exists():
            told = json.loads(file.read_text())
            words = told["model"]["vocab"] if "model" in told else told
            first, second = [word for word, number in words.items() if number in (0, 1)]
            words[first], words[second] = words[second], words[first]
            file.write_text(json.dumps(told))
    given = [f"init_from={run}/{source}", f"first_stage_from={run}/first_stage", f"tokenizer_path={tmp_path}/tokenizer"]
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        model_of(tiny_shapes, run, tmp_path / "out", *given)
    model_of(tiny_shapes, run, tmp_path / "out", *given, "init_parts=[network]")


def test_another_prediction_is_told(
    run: Path, tiny_shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("base", "base.safetensors"):
        model_of(tiny_shapes, run, tmp_path / name, f"init_from={run}/{name}", NO_OTHER, "prediction=epsilon")
        assert "predicts V, this configuration trains it to predict Epsilon" in caplog.text
        caplog.clear()
    model_of(tiny_shapes, run, tmp_path / "same", f"init_from={run}/base", NO_OTHER)
    assert "predict" not in caplog.text


@pytest.mark.parametrize("source", ["base", "ldm"])
def test_a_first_stage_comes_from_a_whole_model_of_ours(
    source: str, run: Path, tiny_shapes: Path, tmp_path: Path
) -> None:
    model = model_of(tiny_shapes, run, tmp_path, f"first_stage_from={run}/{source}")
    assert equal(dict(model.first_stage.state_dict()), read(run / "first_stage").state)


def test_a_damaged_model_folder_is_refused(run: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "ldm", tmp_path / "damaged")
    file = tmp_path / "damaged" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="SHA-256 is not the recorded one"):
        model_of(tiny_shapes, run, tmp_path / "out", f"init_from={tmp_path}/damaged", NO_OTHER)


@pytest.fixture(scope="module")
def silent(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage with another decoder, in a file that does not tell its latent statistics."""
    given = read(run / "first_stage")
    state = given.state | {"decoder.conv_out.bias": torch.ones(3)}
    file = tmp_path_factory.mktemp("silent") / "vae.safetensors"
    write_single_file(replace(given.with_state(state), has_latent_stats=False), file)
    return file


@pytest.mark.parametrize("beside", [True, False], ids=["beside a network", "alone"])
def test_a_first_stage_that_does_not_tell_its_statistics(
    beside: bool, silent: Path, run: Path, tiny_shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are the trained network's; without one, the configured ones; so for the cache of latents as well."""
    more = [f"first_stage_from={silent}", *([f"init_from={run}/base"] if beside else ["first_stage.latent_std=3.5"])]
    model = model_of(tiny_shapes, run, tmp_path, *more)
    wanted = read(run / "base").state["first_stage.latent_std"] if beside else torch.full((4,), 3.5)
    torch.testing.assert_close(model.first_stage.latent_std, wanted)
    assert torch.equal(model.first_stage.decoder.conv_out.bias, torch.ones(3))
    assert "does not say what its latents are normalised by: the values used are " in caplog.text
    overrides = overrides_for(tiny_shapes, tmp_path, f"tokenizer_path={run}/tokenizer", *more)
    config = stage_config(compose("train", overrides), "base", overrides)
    OmegaConf.resolve(config)
    assert load_first_stage(config).fingerprint() == model.first_stage.fingerprint()


def test_a_silent_first_stage_of_other_channels_is_refused(run: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    given = read(run / "first_stage").model
    model = given | {"latent_channels": 6, "decoder": given["decoder"] | {"in_channels": 6}}
    model |= {"encoder": given["encoder"] | {"out_channels": 12}, "latent_mean": 0.0, "latent_std": 1.0}
    state = {name: torch.zeros(t.shape) for name, t in nodes.shapes(model).items()}
    state |= {"latent_mean": torch.zeros(6), "latent_std": torch.ones(6)}
    write_own(Package({"model": model}, state), tmp_path / "own")
    write_single_file(Package({"model": model}, state, has_latent_stats=False), tmp_path / "six.safetensors")
    for name in ("own", "six.safetensors"):
        with pytest.raises(Exception) as caught:
            model_of(tiny_shapes, run, tmp_path / "out", f"first_stage_from={tmp_path}/{name}", f"init_from={run}/base")
        assert any(isinstance(e, UserError) for e in (caught.value, caught.value.__cause__))
