"""Files as other tools write them: old names, averages, variants, first stages alone, what they say of themselves."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import load_tensors, save_tensors
from ldm.diffusion.schedule import ScaledLinear
from ldm.errors import UserError
from ldm.interop import nodes
from ldm.interop.convert import convert, main, read
from ldm.interop.diffusers_folder import write_diffusers
from ldm.interop.names import first_stage_to_diffusers, text_to_open_clip
from ldm.interop.own_folder import write_own
from ldm.interop.package import Package, to_layout
from ldm.interop.recognise import sd2_text
from ldm.interop.single_file import write_single_file

from .tiny import alone, description, first_stage, package, same, state

CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
UNET_FILE = "diffusion_pytorch_model.safetensors"


def tensors_of(family: str, folder: Path) -> dict[str, Tensor]:
    """A family's single file without what this project notes in it."""
    write_single_file(package(family, folder), folder / f"{family}.safetensors")
    return load_tensors(folder / f"{family}.safetensors")[0]


def saved(tensors: dict[str, Tensor], folder: Path, metadata: dict[str, str] | None = None) -> Path:
    save_tensors(folder / "given.safetensors", tensors, metadata)
    return folder / "given.safetensors"


def changed_json(path: Path, **changes: Any) -> None:
    """A JSON file with other values; None takes one away."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in value.items() if v is not None}))


def vae(entries: int | None = None, attended: bool = False) -> Package:
    described = first_stage(entries, 3 if entries else 4, attention_levels=[False, attended])
    return alone(described, has_latent_stats=False)


# ------------------------------------------------------------------------------------------------- single files


def test_clip_under_its_old_names(tmp_path: Path) -> None:
    tensors = {n.replace(f"{CLIP}text_model.", CLIP): t for n, t in tensors_of("sd1", tmp_path).items()}
    assert f"{CLIP}embeddings.token_embedding.weight" in tensors
    same(read(saved(tensors, tmp_path)).state, package("sd1", tmp_path).state)


def test_sd_2_in_the_layout_of_sd_turbo(tmp_path: Path) -> None:
    place = "conditioner.embedders.0.model."
    tensors = {n.replace(OPEN_CLIP, place): t for n, t in tensors_of("sd2", tmp_path).items()}
    found = read(saved(tensors | {f"{place}text_projection": torch.zeros(64, 64)}, tmp_path), prediction="epsilon")
    # with a projection the last layer is the one that SD 2 leaves out
    assert found.model["conditioner"]["encoder"]["layers"] == 1
    same(read(saved(tensors, tmp_path), prediction="epsilon").state, package("sd2", tmp_path).state)


@pytest.mark.parametrize(("layers", "projected"), [(24, True), (24, False), (23, True), (23, False)])
def test_sd_2_uses_23_layers_whatever_the_file_has(layers: int, projected: bool) -> None:
    """Published files have the tower whole; others leave out its last layer, the projection, or one of both."""
    config = dict(hidden_size=1024, layers=layers, heads=16, intermediate=4096, vocab=49408, max_position=77)
    node = nodes.text_conditioner({**config, "act": "gelu", "bos": 49406, "eos": 49407, "pad": 49407})
    names = nodes.text_shapes(node)
    tower = to_layout(names, text_to_open_clip(names))
    tower |= {"text_projection": torch.zeros(1024, 1024, device="meta")} if projected else {}
    text, unused = sd2_text(tower, "file")
    assert text["encoder"]["layers"] == 23
    left = {name for name in tower if f"{OPEN_CLIP}{name}".startswith(unused)}
    assert ("text_projection" in left) == projected
    assert any(name.startswith("transformer.resblocks.23.") for name in left) == (layers == 24)


def test_unused_projections_and_masks_are_left_out(tmp_path: Path) -> None:
    tensors = tensors_of("sd1", tmp_path) | {f"{CLIP}text_projection.weight": torch.zeros(64, 64)}
    tensors |= {"denoiser.log_sigmas": torch.zeros(3), f"{CLIP}attn_mask": torch.zeros(7, 7)}
    same(read(saved(tensors, tmp_path)).state, package("sd1", tmp_path).state)


@pytest.mark.parametrize("family", ["sdxl", "refiner"])
def test_a_text_encoder_without_its_projection_is_refused(family: str, tmp_path: Path) -> None:
    tensors = {n: t for n, t in tensors_of(family, tmp_path).items() if not n.endswith(".text_projection")}
    with pytest.raises(UserError, match="it has no 'text_projection'"):
        read(saved(tensors, tmp_path))


def test_a_measured_scale_factor_counts(tmp_path: Path) -> None:
    """LDM's scale_by_std keeps it as a buffer."""
    found = read(saved(tensors_of("sd1", tmp_path) | {"scale_factor": torch.tensor(0.5)}, tmp_path))
    assert found.state["first_stage.latent_std"].tolist() == [2.0] * 4


@pytest.mark.parametrize("nested", [1, 2])
def test_states_may_be_nested(nested: int, tmp_path: Path) -> None:
    state: dict[str, Any] = {n: torch.nn.Parameter(t) for n, t in tensors_of("sd1", tmp_path).items()}
    state["state_dict"] = {}  # as some merges have it
    for _ in range(nested):
        state = {"state_dict": state, "global_step": 3}
    torch.save(state, tmp_path / "model.ckpt")
    same(read(tmp_path / "model.ckpt").state, package("sd1", tmp_path).state)


# ------------------------------------------------------------------------------------------------- predictions


def test_what_sd_2_predicts_is_told_where_it_was_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tensors_of("sd2", tmp_path), tmp_path)
    assert main([str(file), str(tmp_path / "assumed.safetensors"), "--to", "single_file"]) == 0
    assert "does not say what its UNet predicts: v is assumed" in capsys.readouterr().err
    given = ["--to", "single_file", "--prediction", "epsilon"]
    assert main([str(file), str(tmp_path / "base.safetensors"), *given]) == 0
    assert capsys.readouterr().err == ""
    found = read(tmp_path / "base.safetensors")
    assert (found.prediction, found.config["data"]["size"]) == ("Epsilon", [512, 512])
    assert read(tmp_path / "assumed.safetensors").config["data"]["size"] == [768, 768]


@pytest.mark.parametrize(
    ("marks", "metadata", "prediction", "schedule"),
    [
        ([], {"modelspec.prediction_type": "v"}, "V", "ScaledLinear"),
        (["v_pred"], {}, "V", "ScaledLinear"),
        (["v_pred", "ztsnr"], {}, "V", "ZeroTerminalSNR"),
        ([], {}, "Epsilon", "ScaledLinear"),
    ],
)
def test_a_file_may_say_what_it_predicts(
    marks: list[str], metadata: dict[str, str], prediction: str, schedule: str, tmp_path: Path
) -> None:
    tensors = tensors_of("sdxl", tmp_path) | {name: torch.zeros(0) for name in marks}
    found = read(saved(tensors, tmp_path, metadata))
    assert (found.prediction, nodes.class_name(found.model["denoiser"]["schedule"])) == (prediction, schedule)
    assert not found.notes


def test_other_noise_levels_are_told(tmp_path: Path) -> None:
    levels = torch.from_numpy(ScaledLinear().alphas_cumprod)
    for given, notes in ((levels.half(), 0), (levels.float() * 0.9, 1), (levels[:500], 1)):
        found = read(saved(tensors_of("sd1", tmp_path) | {"alphas_cumprod": given}, tmp_path))
        assert len([note for note in found.notes if "other noise levels" in note]) == notes


def test_a_prediction_against_what_is_told_is_refused(tmp_path: Path) -> None:
    write_own(package("sd1", tmp_path), tmp_path / "own")
    write_diffusers(package("sd1", tmp_path), tmp_path / "folder")
    write_single_file(package("sd1", tmp_path), tmp_path / "file.safetensors")
    for name in ("own", "folder", "file.safetensors"):
        with pytest.raises(UserError, match="says that its UNet predicts Epsilon"):
            convert(tmp_path / name, tmp_path / "out", "ldm", prediction="v")
        assert read(tmp_path / name, prediction="epsilon").prediction == "Epsilon"
    write_own(vae(), tmp_path / "vae")
    with pytest.raises(UserError, match="a first stage alone, which has no prediction"):
        read(tmp_path / "vae", prediction="v")


# ------------------------------------------------------------------------------------------ first stages alone


def old(name: str) -> str:
    """diffusers' name of an attention before 0.18."""
    for new, before in (
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ):
        name = name.replace(new, before)
    return name


@pytest.mark.parametrize("rename", [str, old], ids=["names of now", "old names"])
@pytest.mark.parametrize("entries", [None, 16], ids=["kl", "vq"])
def test_a_file_in_diffusers_names(entries: int | None, rename: Callable[[str], str], tmp_path: Path) -> None:
    model = vae(entries, attended=True)
    theirs = to_layout(model.state, first_stage_to_diffusers(nodes.shapes(model.model)))
    found = read(saved({rename(name): tensor for name, tensor in theirs.items()}, tmp_path))
    assert description(found.model) == description(model.model)
    same(found.state, model.state)


def test_the_old_names_in_a_folder(tmp_path: Path) -> None:
    model = vae(attended=True)
    write_diffusers(model, tmp_path / "vae")
    tensors, _ = load_tensors(tmp_path / "vae" / UNET_FILE)
    save_tensors(tmp_path / "vae" / UNET_FILE, {old(name): tensor for name, tensor in tensors.items()})
    same(read(tmp_path / "vae").part("encoder."), model.part("encoder."))


def test_a_file_in_an_autoencoders_folder_is_what_the_folder_says(tmp_path: Path) -> None:
    write_diffusers(package("sdxl", tmp_path), tmp_path / "folder")
    folder = tmp_path / "folder" / "vae"
    same(read(folder / UNET_FILE).state, read(folder).state)
    (folder / UNET_FILE).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    found = read(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert found.has_latent_stats and found.state["latent_std"][0] == pytest.approx(1 / 0.13025)


def test_averages_of_a_first_stage(tmp_path: Path) -> None:
    write_single_file(vae(), tmp_path / "vae.safetensors")
    tensors, _ = load_tensors(tmp_path / "vae.safetensors")
    average = {"model_ema." + name.replace(".", ""): tensor + 1.0 for name, tensor in tensors.items()}
    file = saved(tensors | average | {"model_ema.decay": torch.tensor(0.9)}, tmp_path)
    name = "decoder.conv_out.bias"
    assert torch.equal(read(file, "raw").state[name] + 1.0, read(file, "ema").state[name])


@pytest.mark.parametrize("to", ["diffusers", "single_file", "ldm"])
def test_a_scale_factor_that_a_file_does_not_tell_is_asked_for(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_single_file(vae(), tmp_path / "vae.safetensors")
    suffix = ".safetensors" if to == "single_file" else ""
    given, out = str(tmp_path / "vae.safetensors"), tmp_path / f"told{suffix}"
    assert main([given, str(tmp_path / f"out{suffix}"), "--to", to]) == 0
    assert "give --scale-factor (0.18215" in capsys.readouterr().err
    assert main([given, str(out), "--to", to, "--scale-factor", "0.13025"]) == 0
    assert capsys.readouterr().err == ""
    std = read(out).state["latent_std"]
    assert torch.equal(std, torch.full((4,), 1.0 / 0.13025))
    with pytest.raises(UserError, match="says what its latents are normalised by"):
        convert(out, tmp_path / "more", "ldm", scale_factor=0.5)
    with pytest.raises(UserError, match="expected a number above 0"):
        convert(Path(given), tmp_path / "more", "ldm", scale_factor=0.0)


def test_a_copy_of_a_file_that_does_not_tell_does_not_tell_either(tmp_path: Path) -> None:
    write_single_file(vae(), tmp_path / "vae.safetensors")
    convert(tmp_path / "vae.safetensors", tmp_path / "copy.safetensors", "single_file")
    assert not read(tmp_path / "copy.safetensors").has_latent_stats


# ---------------------------------------------------------------------------------------------- diffusers folders


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({}, 0.0, 1 / 0.13025),
        ({"scaling_factor": None}, 0.0, 1 / 0.18215),  # the folders of SD 1 have none: diffusers' own counts
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, 0.25, 2.0),
        ({"scaling_factor": 0.5, "latents_mean": [1.0] * 4, "latents_std": [3.0] * 4}, 1.0, 6.0),
    ],
)
def test_latent_statistics_of_a_folder(changes: dict[str, Any], mean: float, std: float, tmp_path: Path) -> None:
    write_diffusers(package("sdxl", tmp_path), tmp_path / "folder")
    changed_json(tmp_path / "folder" / "vae" / "config.json", **changes)
    for folder in (tmp_path / "folder", tmp_path / "folder" / "vae"):
        found = read(folder).first_stage.state
        torch.testing.assert_close(found["latent_mean"], torch.full((4,), mean))
        torch.testing.assert_close(found["latent_std"], torch.full((4,), std))


def pickled(folder: Path) -> None:
    tensors, _ = load_tensors(folder / UNET_FILE)
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    (folder / UNET_FILE).unlink()


def pickled_in_parts(folder: Path) -> None:
    tensors, _ = load_tensors(folder / UNET_FILE)
    files = {name: f"diffusion_pytorch_model-{1 + i % 2:05d}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: t for name, t in tensors.items() if files[name] == file}, folder / file)
    (folder / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / UNET_FILE).unlink()


def variant(folder: Path) -> None:
    (folder / UNET_FILE).rename(folder / "diffusion_pytorch_model.fp16.safetensors")


def pickled_variant(folder: Path) -> None:
    pickled(folder)
    (folder / "diffusion_pytorch_model.bin").rename(folder / "diffusion_pytorch_model.fp16.bin")


@pytest.mark.parametrize("change", [pickled, pickled_in_parts, variant, pickled_variant])
def test_weights_in_other_files(change: Callable[[Path], None], tmp_path: Path) -> None:
    write_diffusers(package("sd1", tmp_path), tmp_path / "folder")
    change(tmp_path / "folder" / "unet")
    same(read(tmp_path / "folder").state, package("sd1", tmp_path).state)


def test_raw_weights_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_diffusers(package("sd1", tmp_path), tmp_path / "folder")
    assert main([str(tmp_path / "folder"), str(tmp_path / "a"), "--to", "ldm", "--weights", "ema"]) == 0
    assert "has one kind of weights alone" in capsys.readouterr().err
    unet = tmp_path / "folder" / "unet"
    tensors, _ = load_tensors(unet / UNET_FILE)
    save_tensors(unet / "diffusion_pytorch_model.non_ema.safetensors", {n: t + 1.0 for n, t in tensors.items()})
    name = "denoiser.network.conv_out.bias"
    assert torch.equal(read(tmp_path / "folder", "raw").state[name], read(tmp_path / "folder").state[name] + 1.0)
    assert main([str(tmp_path / "folder"), str(tmp_path / "b"), "--to", "ldm", "--weights", "ema"]) == 0
    assert capsys.readouterr().err == ""


def test_sizes_may_be_pairs(tmp_path: Path) -> None:
    write_diffusers(package("sd1", tmp_path), tmp_path / "folder")
    changed_json(tmp_path / "folder" / "unet" / "config.json", sample_size=[16, 24])
    assert read(tmp_path / "folder").config["data"]["size"] == [32, 48]


def test_a_tokenizer_beside_ones_own_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_diffusers(package("sd1", tmp_path), tmp_path / "folder")
    given = [str(tmp_path / "folder"), str(tmp_path / "own"), "--to", "ldm", "--tokenizer", "other"]
    assert main(given) == 0
    assert "brings its own tokenizer; other was not used" in capsys.readouterr().err


def test_models_with_channels_of_their_own_travel_or_are_refused(tmp_path: Path) -> None:
    """LDM allows an encoder of more channels than the latent; diffusers' autoencoder does not."""
    described = first_stage()
    described["encoder"] |= {"out_channels": 12}
    described["decoder"] |= {"in_channels": 6}
    model = alone(described)
    write_single_file(model, tmp_path / "vae.safetensors")
    same(read(tmp_path / "vae.safetensors").state, model.state)
    with pytest.raises(UserError, match="has as many latent channels as its decoder takes"):
        convert(tmp_path / "vae.safetensors", tmp_path / "out" / "vae", "diffusers")
    assert not (tmp_path / "out").exists()


def test_a_codebook_has_no_pipeline(tmp_path: Path) -> None:
    """diffusers' Stable Diffusion pipelines cannot decode with a VQModel; a single file has room for it."""
    given = package("sd1", tmp_path)
    described = {**given.model, "first_stage": first_stage(16)}
    own = state(described) | {name: t for name, t in given.state.items() if ".latent_" in name}
    write_own(replace(given, config={**given.config, "model": described}, state=own), tmp_path / "own")
    with pytest.raises(UserError, match="decode with an AutoencoderKL; this model's first stage has a codebook"):
        convert(tmp_path / "own", tmp_path / "out", "diffusers")
    convert(tmp_path / "own", tmp_path / "out.safetensors", "single_file")
    same(read(tmp_path / "out.safetensors").state, own)
