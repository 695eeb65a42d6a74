"""What a conversion does not do: overwrite, take names and values for others, half-write."""

import subprocess
import sys
from pathlib import Path

import pytest

from ldm.checkpoint import load_tensors, save_tensors
from ldm.errors import UserError
from ldm.interop.convert import convert, main
from ldm.interop.model_folder import find_model_folder

from .test_bad_input import own

ROOT = Path(__file__).parents[2]


def test_what_is_there_is_not_overwritten(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    source = str(whole / "whole.safetensors")
    for out in (str(tmp_path / "out"), str(tmp_path / "link"), source):
        assert main([source, out, "--to", "ldm"]) == 1
        assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("new.ckpt", "single_file", "ends in .safetensors"),
        ("new", "single_file", "ends in .safetensors"),
        ("new.safetensors", "diffusers", "--to diffusers writes a folder"),
        ("new.ckpt", "ldm", "--to ldm writes a folder"),
    ],
)
def test_a_name_of_another_format_is_refused_before_anything_is_read(
    name: str, to: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"nothing that could be read")
    assert main([str(tmp_path / "model.ckpt"), str(tmp_path / "folder" / name), "--to", to]) == 1
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("wrong", [{"to": "onnx"}, {"dtype": "float64"}, {"weights": "best"}, {"prediction": "x0"}])
def test_a_value_that_is_none_of_the_allowed_ones(wrong: dict[str, str], whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}: expected"):
        convert(whole / "folder", tmp_path / "out", **({"to": "ldm"} | wrong))  # type: ignore[arg-type]


def test_numbers_that_a_type_does_not_hold_are_refused(whole: Path, tmp_path: Path) -> None:
    tensors, metadata = load_tensors(whole / "whole.safetensors")
    tensors["model.diffusion_model.out.2.bias"][0] = 1e6
    save_tensors(tmp_path / "model.safetensors", tensors, metadata)
    with pytest.raises(UserError, match=r"conv_out.bias goes up to 1e\+06, which torch.float16 cannot hold"):
        convert(tmp_path / "model.safetensors", tmp_path / "out", "ldm", dtype="float16")
    convert(tmp_path / "model.safetensors", tmp_path / "out", "ldm", dtype="bfloat16")


def test_a_full_disk_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk without room."""
    outs = {to: str(tmp_path / "new" / to) for to in ("diffusers", "ldm")}
    outs["single_file"] = str(tmp_path / "new" / "out.safetensors")
    code = f"""
import resource, signal, sys
from ldm.interop.convert import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(sum(main([{str(whole / "whole.safetensors")!r}, out, "--to", to]) for to, out in {outs!r}.items()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == len(outs), done.stderr
    told = done.stderr.splitlines()
    assert len(told) == len(outs) and all("cannot be written" in line for line in told)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_told(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(whole / "folder"), str(tmp_path / "file" / "out"), "--to", "ldm"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(whole: Path, tmp_path: Path) -> None:
    tensors, _ = load_tensors(whole / "whole.safetensors")
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    save_tensors(tmp_path / "model.safetensors", tensors | {name: tensors[name][:-1]})
    with pytest.raises(UserError, match=r"has \d+ tokens, the text encoder knows \d+"):
        convert(tmp_path / "model.safetensors", tmp_path / "out", "ldm", tokenizer=str(whole / "folder" / "tokenizer"))
    assert not (tmp_path / "out").exists()


def test_sampling_from_another_format_says_how(whole: Path, tmp_path: Path) -> None:
    for path in (whole / "whole.safetensors", whole / "folder"):
        with pytest.raises(UserError, match="convert it first"):
            find_model_folder(path, "diffusion")
    with pytest.raises(UserError, match="a part of the model folder"):
        find_model_folder(own()(whole, tmp_path) / "weights.safetensors", "diffusion")
