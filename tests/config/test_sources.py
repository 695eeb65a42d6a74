"""Training goes on from weights of every format; parts that do not fit together are refused with the reason."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoint import load_tensors
from ldm.config.sources import _check_latents, load_strictly, weights_of
from ldm.errors import UserError
from ldm.first_stage.autoencoder import FirstStage
from ldm.first_stage.regularizer import KLRegularizer
from ldm.interop import nodes
from ldm.interop.convert import convert, read
from ldm.interop.package import Package
from ldm.networks.autoencoder import Decoder, Encoder
from tests.interop.tiny import package

from .launch import model_of


@pytest.mark.parametrize("source", ["base", "base/model", "base.safetensors", "diffusers", "ldm"])
def test_training_begins_with_weights_of_any_format(source: str, run: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    path = run / source
    wanted = read(run / "base").state
    model = model_of(tiny_shapes, run, tmp_path, f"init_from={path}", f"first_stage_from={run}/first_stage")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_averaged_or_raw_weights_are_chosen(run: Path) -> None:
    name = "denoiser.network.conv_in.weight"
    raw, _ = load_tensors(run / "base" / "model" / "weights.safetensors")
    average, _ = load_tensors(run / "base" / "model" / "ema.safetensors")
    assert not torch.equal(raw[name], average[name])
    assert torch.equal(read(run / "base", "raw").state[name], raw[name])
    assert torch.equal(read(run / "base", "ema").state[name], average[name])
    assert torch.equal(read(run / "base.safetensors").state[name], average[name])


@pytest.mark.parametrize("source", ["base.safetensors", "diffusers", "first_stage"])
def test_a_first_stage_comes_from_any_format(source: str, run: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    model = model_of(tiny_shapes, run, tmp_path, f"first_stage_from={run / source}")
    wanted = read(run / "first_stage").state
    for name, tensor in model.first_stage.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def changed(run: Path, path: Path, change: Any) -> Path:
    from ldm.interop.own_folder import write_own

    package = read(run / "first_stage")
    change(package.state)
    write_own(package, path)
    return path


def test_other_latent_statistics_are_refused(run: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    other = changed(run, tmp_path / "other", lambda state: state["latent_std"].mul_(3.0))
    with pytest.raises(UserError, match=r"was trained on latents whose latent_std is \[.*would see other latents"):
        model_of(tiny_shapes, run, tmp_path, f"first_stage_from={other}", f"init_from={run}/base")
    model_of(tiny_shapes, run, tmp_path, f"first_stage_from={other}")  # a network that is trained anew


def test_another_decoder_of_the_same_latents_is_taken(run: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    other = changed(run, tmp_path / "other", lambda state: state["decoder.conv_out.bias"].add_(1.0))
    model = model_of(tiny_shapes, run, tmp_path, f"first_stage_from={other}", f"init_from={run}/base")
    assert torch.equal(model.first_stage.decoder.conv_out.bias, read(other).state["decoder.conv_out.bias"])


def test_other_latent_channels_are_refused(run: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"latents of 4 channels.*in_channels=9.*network\.in_channels=4"):
        model_of(tiny_shapes, run, tmp_path, "network.in_channels=9", f"first_stage_from={run}/first_stage")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("network.context_dim=24", r"gives tokens of \d+ numbers, the network has context_dim=24"),
        ("network.vector_dim=16", "gives no vector, the network has vector_dim=16. Give network.vector_dim=null"),
    ],
)
def test_a_text_encoder_that_does_not_fit_the_network_is_refused(
    run: Path, tiny_shapes: Path, tmp_path: Path, override: str, told: str
) -> None:
    with pytest.raises(Exception) as caught:
        model_of(tiny_shapes, run, tmp_path, override, f"first_stage_from={run}/first_stage")
    causes = [caught.value, caught.value.__cause__]
    assert any(isinstance(cause, UserError) and re.search(told, str(cause)) for cause in causes)


def test_a_first_stage_of_other_channels_than_a_network_was_trained_on_is_refused() -> None:
    first_stage = FirstStage(
        Encoder(3, 8, (1,), 1, 16, groups=4), KLRegularizer(), Decoder(8, 8, (1,), 1, groups=4), latent_channels=8
    )
    state = {"first_stage.latent_mean": torch.zeros(4), "first_stage.latent_std": torch.ones(4)}
    with pytest.raises(UserError, match=r"in base was trained on latents of 4 channels, the first stage in vae has 8"):
        _check_latents(first_stage, "vae", Package({}, state, origin="base"))


def test_weights_of_another_width_are_refused(run: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"don't fit the model: denoiser.network.*in the file, .* in the model"):
        model_of(
            tiny_shapes, run, tmp_path, "network.model_channels=32", f"init_from={run}/base.safetensors",
            f"first_stage_from={run}/first_stage",
        )  # fmt: skip


def test_weights_of_sd_2_are_refused_for_a_network_of_sd_1(tmp_path: Path) -> None:
    given = {name: package(name, tmp_path) for name in ("sd1", "sd2")}
    network = nodes.build(given["sd1"].model["denoiser"]["network"])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=r"don't fit the model: time_embed.0.weight: \[256, 64\] in the file") as caught:
        load_strictly(network, given["sd2"].part("denoiser.network."), "sd2.safetensors")
    assert "more" in str(caught.value)  # of the many, some are named
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_first_stage_alone_is_no_model(run: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    convert(run / "first_stage", tmp_path / "vae.safetensors", "single_file")
    with pytest.raises(UserError, match="holds a first stage alone; give it as first_stage_from="):
        first_stage = f"first_stage_from={run}/first_stage"
        model_of(tiny_shapes, run, tmp_path, f"init_from={tmp_path}/vae.safetensors", first_stage)
    with pytest.raises(UserError, match="no such path exists"):
        model_of(tiny_shapes, run, tmp_path, "init_from=nowhere", f"first_stage_from={run}/first_stage")


def renamed_target(folder: Path, out: Path, old: str, new: str) -> Path:
    """A copy of a model folder with another class in its config.yaml."""
    shutil.copytree(folder, out)
    text = (out / "config.yaml").read_text()
    assert f"_target_: {old}\n" in text
    (out / "config.yaml").write_text(text.replace(f"_target_: {old}\n", f"_target_: {new}\n"))
    return out


def test_a_users_own_classes_are_weights_to_begin_with(run: Path, tmp_path: Path) -> None:
    """They have no counterpart in other formats, but training reads them as they are."""
    network = renamed_target(run / "ldm", tmp_path / "network", "ldm.networks.unet.UNet", "mine.DiT")
    found = weights_of(str(network), {}, "init_from", "diffusion")
    assert found.model["denoiser"]["network"]["_target_"] == "mine.DiT"
    assert found.state.keys() == read(run / "ldm").state.keys()
    with pytest.raises(UserError, match=r"a mine\.DiT has no counterpart in other formats"):
        convert(network, tmp_path / "out", "ldm")
    own = "ldm.first_stage.autoencoder.FirstStage"
    for source in ("ldm", "first_stage/model"):
        folder = renamed_target(run / source, tmp_path / source.split("/")[0], own, "mine.FirstStage")
        found = weights_of(str(folder), {}, "first_stage_from", "first_stage")
        assert (found.kind, found.model["_target_"]) == ("first_stage", "mine.FirstStage")
        assert found.state.keys() == read(run / "first_stage").state.keys()
