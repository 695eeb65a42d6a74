"""Files that are no model, or not a whole one: one clear error each, and nothing is written."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import load_tensors, save_tensors
from ldm.interop.convert import main
from ldm.interop.diffusers_folder import write_diffusers
from ldm.interop.single_file import write_single_file

from .tiny import package

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole single file of an SD1-shaped model."""
    folder = tmp_path_factory.mktemp("whole")
    write_single_file(package("sd1", folder), folder / "whole.safetensors")
    write_diffusers(package("sd1", folder), folder / "folder", shard_bytes=200_000)
    return folder


def code_in_it(whole: Path, path: Path) -> Path:
    class Code:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (Path, ("ran",))

    file = path / "model.ckpt"
    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "callbacks": Code()}, file, pickle_protocol=pickle.DEFAULT_PROTOCOL
    )
    return file


def cut_short(whole: Path, path: Path) -> Path:
    file = path / "cut.safetensors"
    file.write_bytes((whole / "whole.safetensors").read_bytes()[:-1000])
    return file


def cut_checkpoint(whole: Path, path: Path) -> Path:
    tensors, _ = load_tensors(whole / "whole.safetensors")
    torch.save({"state_dict": tensors}, path / "cut.ckpt")
    (path / "cut.ckpt").write_bytes((path / "cut.ckpt").read_bytes()[:-1000])
    return path / "cut.ckpt"


def lora(whole: Path, path: Path) -> Path:
    file = path / "model.safetensors"
    save_tensors(file, {"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.zeros(4, 8)})
    return file


def peft_lora(whole: Path, path: Path) -> Path:
    """As PEFT and diffusers name it."""
    file = path / "pytorch_lora_weights.safetensors"
    save_tensors(file, {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.zeros(4, 8)})
    return file


def controlnet(whole: Path, path: Path) -> Path:
    file = path / "model.safetensors"
    save_tensors(file, {"control_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)})
    return file


def controlnet_folder(whole: Path, path: Path) -> Path:
    folder = path / "controlnet"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    save_tensors(folder / "diffusion_pytorch_model.safetensors", {"controlnet_mid_block.bias": torch.zeros(32)})
    return folder


def sd2_weights(whole: Path, path: Path) -> Path:
    """A folder whose UNet's configuration is SD 1's and whose UNet's weights are SD 2's."""
    write_diffusers(package("sd1", path / "parts"), path / "folder")
    write_diffusers(package("sd2", path / "parts"), path / "sd2")
    name = "diffusion_pytorch_model.safetensors"
    (path / "folder" / "unet" / name).write_bytes((path / "sd2" / "unet" / name).read_bytes())
    return path / "folder"


def epsilon_without_signal(whole: Path, path: Path) -> Path:
    write_diffusers(package("sd1", path / "parts"), path / "folder")
    file = path / "folder" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    return path / "folder"


def changed(whole: Path, path: Path) -> Path:
    """One tensor less, one too many, one of another shape."""
    tensors, metadata = load_tensors(whole / "whole.safetensors")
    del tensors[UNET + "out.2.bias"]
    tensors[UNET + "out.3.weight"] = torch.zeros(1)
    tensors[UNET + "time_embed.0.bias"] = torch.zeros(3)
    save_tensors(path / "model.safetensors", tensors, metadata)
    return path / "model.safetensors"


def without_text(whole: Path, path: Path) -> Path:
    tensors, _ = load_tensors(whole / "whole.safetensors")
    save_tensors(path / "model.safetensors", {n: t for n, t in tensors.items() if not n.startswith("cond_stage")})
    return path / "model.safetensors"


def without_a_shard(whole: Path, path: Path) -> Path:
    target = path / "folder"
    for file in (whole / "folder").rglob("*"):
        if file.is_file() and "00002-of" not in file.name:
            place = target / file.relative_to(whole / "folder")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    return target


def something_else(whole: Path, path: Path) -> Path:
    save_tensors(path / "model.safetensors", {"layers.0.weight": torch.zeros(1)})
    return path / "model.safetensors"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (code_in_it, "cannot be read safely"),
        (cut_short, "not a whole safetensors file"),
        (cut_checkpoint, "not a whole torch checkpoint"),
        (lora, "holds a LoRA"),
        (peft_lora, "holds a LoRA"),
        (controlnet, "holds a ControlNet"),
        (controlnet_folder, "holds a ControlNetModel alone"),
        (sd2_weights, "time_embedding.linear_1.weight: [256, 64] in the file, [128, 32] expected"),
        (epsilon_without_signal, "singular at the last time"),
        (changed, "missing model.diffusion_model.out.2.bias; unexpected model.diffusion_model.out.3.weight; "),
        (changed, "model.diffusion_model.time_embed.0.bias: [3] in the file, [128] expected"),
        (without_text, "UNet without a text encoder"),
        (without_a_shard, "00002-of-"),
        (something_else, "no model that is known here"),
        (lambda whole, path: path / "nowhere", "nothing is there"),
    ],
)
def test_one_clear_error_and_nothing_written(
    make: Callable[[Path, Path], Path],
    message: str,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make(whole, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(source), str(tmp_path / "out"), "--to", "diffusers"]) == 1
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_there_is_not_overwritten(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert main([str(whole / "whole.safetensors"), str(tmp_path / "out"), "--to", "ldm"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([str(whole / "whole.safetensors"), str(tmp_path / "new.ckpt"), "--to", "single_file"]) == 1
    assert "ends in .safetensors" in capsys.readouterr().err
