"""Files that are no model, or not a whole one: one clear error each, and nothing is written."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoint import load_tensors, save_tensors
from ldm.interop.convert import main
from ldm.interop.diffusers_folder import write_diffusers
from ldm.interop.own_folder import write_own

from .tiny import package

UNET = "model.diffusion_model."
ROOT = Path(__file__).parents[2]


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


def named(*names: str) -> Callable[[Path, Path], Path]:
    """A file with tensors of these names."""

    def make(whole: Path, path: Path) -> Path:
        save_tensors(path / "model.safetensors", {name: torch.zeros(4, 8) for name in names})
        return path / "model.safetensors"

    return make


def pickle_of(value: object) -> Callable[[Path, Path], Path]:
    def make(whole: Path, path: Path) -> Path:
        torch.save(value, path / "model.pt")
        return path / "model.pt"

    return make


def empty(name: str) -> Callable[[Path, Path], Path]:
    def make(whole: Path, path: Path) -> Path:
        (path / name).write_bytes(b"")
        return path / name

    return make


def folder_of(**files: str) -> Callable[[Path, Path], Path]:
    def make(whole: Path, path: Path) -> Path:
        (path / "folder").mkdir()
        for name, text in files.items():
            (path / "folder" / f"{name}.json").write_text(text)
        return path / "folder"

    return make


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path, Path], Path]:
    """The whole file with other tensors, and without what this project notes in it."""

    def make(whole: Path, path: Path) -> Path:
        tensors, _ = load_tensors(whole / "whole.safetensors")
        change(tensors)
        save_tensors(path / "model.safetensors", tensors)
        return path / "model.safetensors"

    return make


def with_json(file: str, **changes: object) -> Callable[[Path, Path], Path]:
    """The whole folder with other values in one of its JSON files; None takes one away."""

    def make(whole: Path, path: Path) -> Path:
        shutil.copytree(whole / "folder", path / "folder")
        value = json.loads((path / "folder" / file).read_text()) | changes
        (path / "folder" / file).write_text(json.dumps({name: v for name, v in value.items() if v is not None}))
        return path / "folder"

    return make


def without(*files: str) -> Callable[[Path, Path], Path]:
    """The whole folder without some files, by patterns."""

    def make(whole: Path, path: Path) -> Path:
        shutil.copytree(whole / "folder", path / "folder")
        for pattern in files:
            for file in (path / "folder").glob(pattern):
                file.unlink()
        return path / "folder"

    return make


def own(*gone: str, config: str | None = None) -> Callable[[Path, Path], Path]:
    """A model folder of ours, without some files or with another configuration."""

    def make(whole: Path, path: Path) -> Path:
        write_own(package("sd1", path / "parts"), path / "own")
        for name in gone:
            (path / "own" / name).unlink()
        if config is not None:
            (path / "own" / "config.yaml").write_text(config)
        return path / "own"

    return make


def something_else(whole: Path, path: Path) -> Path:
    save_tensors(path / "model.safetensors", {"layers.0.weight": torch.zeros(1)})
    return path / "model.safetensors"


def upscaler(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UNET + "input_blocks.0.0.weight"] = torch.zeros(32, 7, 3, 3)
    tensors[UNET + "label_emb.weight"] = torch.zeros(1000, 128)


def one_of_another_width(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(32, 77)


def with_metadata(text: str) -> Callable[[Path, Path], Path]:
    def make(whole: Path, path: Path) -> Path:
        save_tensors(path / "model.safetensors", load_tensors(whole / "whole.safetensors")[0], {"ldm": text})
        return path / "model.safetensors"

    return make


def with_description(change: Callable[[dict[str, Any]], object], tokenizers: int = 1) -> Callable[[Path, Path], Path]:
    """The whole file with another model in its metadata."""

    def make(whole: Path, path: Path) -> Path:
        tensors, metadata = load_tensors(whole / "whole.safetensors")
        value = json.loads(metadata["ldm"])
        change(value["config"]["model"])
        value["tokenizers"] *= tokenizers
        save_tensors(path / "model.safetensors", tensors, {"ldm": json.dumps(value)})
        return path / "model.safetensors"

    return make


def with_tokenizer_file(name: str) -> Callable[[Path, Path], Path]:
    """The whole file with another file in its tokenizer."""

    def make(whole: Path, path: Path) -> Path:
        tensors, metadata = load_tensors(whole / "whole.safetensors")
        value = json.loads(metadata["ldm"])
        value["tokenizers"][0][name] = "{}"
        save_tensors(path / "model.safetensors", tensors, {"ldm": json.dumps(value)})
        return path / "model.safetensors"

    return make


def without_first_stage(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("first_stage_model.")]:
        del tensors[name]


def without_transformers(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "transformer_blocks" in name or "proj_in" in name]:
        if name.startswith(UNET):
            del tensors[name]


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
        (something_else, "not a model that is known here"),
        (lambda whole, path: path / "nowhere", "nothing is there"),
        (named("oft_unet_down_blocks_0.oft_blocks"), "holds a LoRA"),
        (named("controlnet_cond_embedding.conv_in.weight"), "holds a ControlNet"),
        (named("lllite_unet_input_blocks_1.down.0.weight"), "holds a ControlNet"),
        (named("emb_params"), "holds a textual inversion"),
        (named("clip_l", "clip_g"), "holds a textual inversion"),
        (pickle_of({"<cat>": torch.zeros(768)}), "holds a textual inversion"),
        (pickle_of({"string_to_param": {"*": torch.zeros(1, 768)}, "name": "cat"}), "holds a textual inversion"),
        (named("adapter.body.0.resnets.0.block1.weight"), "holds a T2I-adapter"),
        (named("image_proj.proj.weight"), "holds an IP-adapter"),
        (named("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"), "holds motion modules"),
        (named("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"), "holds a UNet alone"),
        (named("text_model.embeddings.token_embedding.weight"), "holds a text encoder alone"),
        (pickle_of({0: torch.zeros(1)}), "holds no weights by name"),
        (pickle_of({"state_dict": {}}), "holds no weights by name (it is empty)"),
        (pickle_of({"a": 3.0}), "holds no weights by name (a is a float)"),
        (pickle_of([torch.zeros(1)]), "holds no weights by name"),
        (empty("model.safetensors"), "not a whole safetensors file"),
        (empty("model.ckpt"), "an empty or cut file"),
        (folder_of(), "holds no model that is known here"),
        (folder_of(checkpoint="{}"), "a checkpoint to resume from"),
        (folder_of(model="{}"), "not the record of a model folder"),
        (folder_of(config='{"architectures": ["CLIPTextModel"]}'), "holds a CLIPTextModel alone"),
        (folder_of(config='{"_class_name": "UNet2DConditionModel"}'), "holds a UNet2DConditionModel alone"),
        (folder_of(config='{"_class_name": "AutoencoderKL"}'), "it has no 'block_out_channels'"),
        (folder_of(config='{"_class_name": "AutoencoderTiny"}'), "holds a AutoencoderTiny alone"),
        (folder_of(config='{"_class_name": "VQModel", "norm_type": "spatial"}'), "norm_type='spatial' is not known"),
        (folder_of(model_index='{"_class_name": "FluxPipeline"}'), "the folder of a FluxPipeline"),
        (with_json("model_index.json", _class_name="StableDiffusionControlNetPipeline"), "has other parts"),
        (with_json("unet/config.json", cross_attention_dim=None), "it has no 'cross_attention_dim'"),
        (with_json("unet/config.json", transformer_layers_per_block=[[1], [1]]), "expected a number, or one per level"),
        (with_json("unet/config.json", time_cond_proj_dim=256), "time_cond_proj_dim=256 is not known"),
        (with_json("unet/config.json", in_channels=8), "takes 8 channels and gives 4"),
        (with_json("unet/config.json", cross_attention_dim=96), "takes tokens of width 96"),
        (
            with_json("scheduler/scheduler_config.json", _class_name="EDMEulerScheduler", beta_schedule=None),
            "has a EDMEulerScheduler without beta_schedule",
        ),
        (with_json("text_encoder/config.json", model_type="t5"), "model_type='t5' is not known"),
        (with_json("unet/diffusion_pytorch_model.safetensors.index.json", weight_map=None), "names no files"),
        (without("unet/*.safetensors*"), "unet has no weights"),
        (without("unet/config.json"), "unet/config.json is missing"),
        (without("tokenizer/*"), "tokenizer has no tokenizer"),
        (without("tokenizer/tokenizer.json", "tokenizer/merges.txt"), "tokenizer has no tokenizer"),
        (lambda whole, path: own()(whole, path) / "weights.safetensors", "is a part of the model folder"),
        (own("config.yaml"), "it has no config.yaml"),
        (own("weights.safetensors"), "no file at"),
        (own(config="a: ["), "its config.yaml is not the one of a model"),
        (own(config="{}"), "its config.yaml is not the one of a model"),
        (with_tensors(upscaler), "takes 7 channels and gives 4, next to a first stage of 4: known here are 4, and 9"),
        (with_tensors(lambda t: t[UNET + "out.2.bias"].fill_(float("nan"))), "NaN or infinities in denoiser.network"),
        (with_tensors(without_transformers), "it has no "),
        (with_tensors(lambda t: t.pop(UNET + "input_blocks.0.0.weight")), "has no 'input_blocks.0.0.weight'"),
        (with_tensors(lambda t: t.pop("first_stage_model.encoder.conv_in.weight")), "has no 'encoder.conv_in.weight'"),
        (with_tensors(one_of_another_width), "attn2.to_k.weight: [32, 77] in the file, [32, 64] expected"),
        (with_metadata("{"), "its metadata 'ldm' are not readable"),
        (with_metadata("[1]"), "its metadata 'ldm' are not readable"),
        (with_metadata('{"config": {"model": {}}, "tokenizers": []}'), "its metadata 'ldm' are not readable"),
        (with_description(lambda node: node.pop("denoiser")), "its metadata 'ldm' are not readable"),
        (
            with_description(lambda node: node["denoiser"]["network"].update(_target_="os.system", command="ls")),
            "describes a model with 'os.system', which is not known here",
        ),
        (
            with_description(lambda node: node["conditioner"]["tokenizer"].update(_partial_=True)),
            "describes a model with '_partial_', which is not known here",
        ),
        (
            with_description(lambda node: node["first_stage"].update(latent_std="${oc.env:HOME}")),
            "describes a model with an interpolation",
        ),
        (
            with_description(lambda node: node.update(denoiser=node["first_stage"])),
            "has no counterpart in other formats; expected ldm.diffusion.denoiser.Denoiser",
        ),
        (
            with_description(lambda node: node["denoiser"]["network"].update(channel_mult=3)),
            "the description of its model does not build",
        ),
        (with_description(lambda node: None, tokenizers=2), "has 2 tokenizers, not one for each text encoder"),
        (with_tokenizer_file("../../escaped.json"), "has a tokenizer's file '../../escaped.json'"),
        (with_tensors(without_first_stage), "has no first stage (first_stage_model.*)"),
        (with_tensors(lambda t: t.update({"extra.weight": torch.zeros(1)})), "unexpected extra.weight"),
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
