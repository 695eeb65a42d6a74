"""Round trips between the formats, and what is recognised without help."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from ldm.checkpoint import load_tensors, save_tensors
from ldm.config.check import build
from ldm.config.trained import load_trained
from ldm.diffusion.schedule import Discrete, Linear, RectifiedFlow, ScaledLinear, ZeroTerminalSNR
from ldm.errors import UserError
from ldm.interop import nodes
from ldm.interop.convert import cast, convert, main, read
from ldm.interop.diffusers_folder import write_diffusers
from ldm.interop.model_folder import find_model_folder
from ldm.interop.own_folder import portable, read_model_folder, write_own
from ldm.interop.single_file import write_single_file
from ldm.sampling.ddim import DDIM
from ldm.sampling.grid import Leading, Trailing

from .tiny import alone, description, first_stage, package, same, tokenizer, with_schedule

FAMILIES = ["sd1", "sd2", "sdxl", "refiner", "inpainting"]


def files(folder: Path) -> dict[str, object]:
    """Everything in a folder: tensors by file and name, texts as they are."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found |= {f"{name}:{key}": tensor for key, tensor in load_tensors(path)[0].items()}
        elif path.is_file():
            found[name] = path.read_text()
    return found


def assert_same_files(given: Path, wanted: Path) -> None:
    ours, theirs = files(given), files(wanted)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        mine = ours[name]
        assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value, name


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_are_equal_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = package(family, tmp_path)
    write_diffusers(model, tmp_path / "d1")
    convert(tmp_path / "d1", tmp_path / "s1.safetensors", "single_file")
    convert(tmp_path / "s1.safetensors", tmp_path / "l1", "ldm")
    convert(tmp_path / "l1", tmp_path / "s2.safetensors", "single_file")
    convert(tmp_path / "s2.safetensors", tmp_path / "d2", "diffusers")
    convert(tmp_path / "d2", tmp_path / "l2", "ldm")
    assert_same_files(tmp_path / "d2", tmp_path / "d1")
    same(load_tensors(tmp_path / "s2.safetensors")[0], load_tensors(tmp_path / "s1.safetensors")[0])
    same(
        load_tensors(tmp_path / "l2" / "weights.safetensors")[0],
        load_tensors(tmp_path / "l1" / "weights.safetensors")[0],
    )
    same(read(tmp_path / "l2").state, model.state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_recognised_by_keys_and_shapes(family: str, tmp_path: Path) -> None:
    """A file without metadata, with what such files hold beside the weights."""
    model = package(family, tmp_path)
    write_single_file(model, tmp_path / "model.safetensors")
    tensors, _ = load_tensors(tmp_path / "model.safetensors")
    tensors |= {"betas": torch.zeros(1000), "model_ema.num_updates": torch.tensor(3)}
    if family == "sd1":
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if family == "sd2":  # OpenCLIP's whole tower, of which the last layer is not used
        last = "cond_stage_model.model.transformer.resblocks."
        tensors |= {n.replace(f"{last}1.", f"{last}2."): t for n, t in tensors.items() if n.startswith(f"{last}1.")}
        tensors["cond_stage_model.model.text_projection"] = torch.zeros(64, 64)
        tensors["cond_stage_model.model.logit_scale"] = torch.zeros(())
    save_tensors(tmp_path / "unnamed.safetensors", tensors)
    found = read(tmp_path / "unnamed.safetensors")
    same(found.state, model.state)
    known, wanted = description(found.model), description(model.model)
    assert known["denoiser"] == wanted["denoiser"]
    assert known["first_stage"] == wanted["first_stage"]
    assert len(nodes.conditioners(known)) == len(nodes.conditioners(wanted))
    for part, other in zip(nodes.conditioners(known).values(), nodes.conditioners(wanted).values(), strict=True):
        assert {**part, "default": None} == {**other, "default": None}  # of the published models' sizes


def test_a_legacy_checkpoint_gives_averaged_or_raw_weights(tmp_path: Path) -> None:
    model = package("sd1", tmp_path)
    write_single_file(model, tmp_path / "model.safetensors")
    tensors, _ = load_tensors(tmp_path / "model.safetensors")
    name = "model.diffusion_model.out.2.bias"
    average = {"model_ema.diffusion_modelout2bias": tensors[name] + 1.0}
    torch.save({"state_dict": tensors | average, "global_step": 7}, tmp_path / "model.ckpt")
    ours = "denoiser.network.conv_out.bias"
    assert torch.equal(read(tmp_path / "model.ckpt", "raw").state[ours], tensors[name])
    assert torch.equal(read(tmp_path / "model.ckpt", "ema").state[ours], tensors[name] + 1.0)


@pytest.mark.parametrize("to", ["diffusers", "single_file"])
def test_statistics_per_channel_are_folded_and_come_back(to: str, tmp_path: Path) -> None:
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 4.0, 0.5])
    model = package("sd1", tmp_path, lambda channels: (mean, std))
    write_own(model, tmp_path / "own")
    out = tmp_path / ("out" if to == "diffusers" else "out.safetensors")
    convert(tmp_path / "own", out, to)
    file = out / "vae" / "diffusion_pytorch_model.safetensors" if to == "diffusers" else out
    tensors, metadata = load_tensors(file)
    name = next(name for name in tensors if name.endswith("post_quant_conv.bias"))
    assert not torch.allclose(tensors[name], model.state["first_stage.post_quant_conv.bias"])
    convert(out, tmp_path / "back", "ldm")
    same(read(tmp_path / "back").state, read(tmp_path / "own").state)
    tensors[name] = tensors[name] + 1.0  # trained on by another tool: what was noted is out of date
    save_tensors(file, tensors, metadata)
    assert not read(out).state["first_stage.latent_mean"].any()
    save_tensors(file, tensors, metadata | {"ldm.unfolded": metadata["ldm.unfolded"][:-40]})
    with pytest.raises(UserError, match=r"metadata 'ldm\.unfolded' of the first stage are damaged"):
        read(out)


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("to", ["diffusers", "single_file", "ldm"])
def test_first_stages_alone(kind: str, to: str, tmp_path: Path) -> None:
    model = alone(first_stage(16, 3) if kind == "vq" else first_stage())
    channels = model.model["latent_channels"]
    model.state |= {"latent_mean": torch.rand(channels), "latent_std": torch.rand(channels) + 1.0}
    write_own(model, tmp_path / "own")
    out = tmp_path / ("out.safetensors" if to == "single_file" else "out")
    convert(tmp_path / "own", out, to)
    found = read(out)
    same(found.state, model.state)
    assert found.kind == "first_stage"
    if to == "single_file":  # by keys and shapes alone; the statistics are not among them
        save_tensors(tmp_path / "bare.safetensors", load_tensors(out)[0] | {"loss.logvar": torch.zeros(())})
        bare = read(tmp_path / "bare.safetensors")
        assert description(bare.model) == description(model.model)
        same(bare.part("encoder."), found.part("encoder."))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("to", ["single_file", "diffusers", "ldm"])
def test_half_precision_on_request(to: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_own(package("sd1", tmp_path), tmp_path / "own")
    out = tmp_path / ("half.safetensors" if to == "single_file" else "half")
    name = str(dtype).removeprefix("torch.")
    assert main([str(tmp_path / "own"), str(out), "--to", to, "--dtype", name]) == 0
    written = [out] if out.is_file() else sorted(out.rglob("*.safetensors"))
    kept = {"latent_mean", "latent_std"}  # four numbers each
    tensors = {n: t for file in written for n, t in load_tensors(file)[0].items() if n.split(".")[-1] not in kept}
    assert {t.dtype for t in tensors.values()} == {dtype}
    wanted = cast(read(tmp_path / "own"), dtype)
    same(read(out).state, wanted.state)
    assert wanted.state["first_stage.latent_std"].dtype == torch.float32


@pytest.mark.parametrize("to", ["diffusers", "single_file", "ldm"])
@pytest.mark.parametrize("kind", [ScaledLinear, Linear])
def test_a_schedule_of_zero_terminal_snr_travels(kind: type[Discrete], to: str, tmp_path: Path) -> None:
    given = package("sd2", tmp_path)
    betas = {name: value for name, value in given.model["denoiser"]["schedule"].items() if name != "_target_"}
    schedule = nodes.node(ZeroTerminalSNR, schedule=nodes.node(kind, **betas))
    model = with_schedule(given, schedule)
    write_own(model, tmp_path / "own")
    out = tmp_path / ("out.safetensors" if to == "single_file" else "out")
    convert(tmp_path / "own", out, to)
    assert read(out).model["denoiser"]["schedule"] == schedule
    convert(out, tmp_path / "back", "ldm")
    same(read(tmp_path / "back").state, model.state)
    denoiser = load_trained(str(tmp_path / "back"), "ema", "cpu").model.denoiser
    assert float(denoiser.schedule(torch.tensor(999.0)).alpha) == 0.0


def test_large_weights_are_written_in_shards(tmp_path: Path) -> None:
    model = package("sd1", tmp_path)
    write_diffusers(model, tmp_path / "out", shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    same(read(tmp_path / "out").state, model.state)


def test_the_padding_that_a_configuration_names_travels(tmp_path: Path) -> None:
    """OpenCLIP's, beside a tokenizer of the hub whose files say another."""
    write_own(package("sd1", tmp_path), tmp_path / "model")
    tokenizer(tmp_path / "hub")
    file = tmp_path / "model" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["model"]["conditioner"]["tokenizer"] |= {"name_or_path": str(tmp_path / "hub"), "pad_token": "!"}
    file.write_text(yaml.safe_dump(config))
    found = portable(read_model_folder(find_model_folder(tmp_path / "model", "diffusion"), "ema"))
    assert json.loads(found.tokenizers[0]["tokenizer_config.json"])["pad_token"] == "!"


def test_a_converted_model_says_how_it_is_sampled(tmp_path: Path) -> None:
    """As diffusers' pipelines do it, unless the model says otherwise itself."""
    given = package("sd2", tmp_path)
    zero_terminal = nodes.node(ZeroTerminalSNR, schedule=given.model["denoiser"]["schedule"])
    own = given.model["denoiser"]["schedule"]
    for schedule, grid in ((own, Leading), (zero_terminal, Trailing), (nodes.node(RectifiedFlow), Trailing)):
        denoiser = {**given.model["denoiser"], "schedule": schedule}
        sampling = nodes.model_config({**given.model, "denoiser": denoiser})["sampling"]
        assert sampling["grid"] == nodes.node(grid)
        for part in ("sampler", "grid"):
            assert isinstance(build(OmegaConf.create(sampling[part])), {"sampler": DDIM, "grid": grid}[part])
    few = {"sampler": {"_target_": "mine.Sampler"}, "steps": 4, "guidance_scale": 1.0}
    write_own(replace(given, config={**given.config, "sampling": few}), tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "copy", "ldm")
    assert yaml.safe_load((tmp_path / "copy" / "config.yaml").read_text())["sampling"] == few
