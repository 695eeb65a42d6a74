"""Weights from one format to another: python -m ldm.interop.convert IN OUT --to diffusers|single_file|ldm

IN is a run's folder, a stage's or a model folder of this project, a diffusers folder, or a single file in CompVis' or
sgm's layout (.safetensors, .ckpt); what it holds is recognised from its contents. OUT must not exist.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.interop.diffusers_folder import is_diffusers, read_diffusers, write_diffusers
from ldm.interop.model_folder import find_model_folder
from ldm.interop.own_folder import load_tokenizer, package_of, write_own
from ldm.interop.package import Package
from ldm.interop.single_file import read_single_file, write_single_file

Write = Callable[[Package, Path], None]
FORMATS: dict[str, Write] = {"diffusers": write_diffusers, "single_file": write_single_file, "ldm": write_own}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PREDICTIONS = {"epsilon": "Epsilon", "v": "V"}
CLIP = "openai/clip-vit-large-patch14"
OPEN_CLIP_PAD = "!"  # OpenCLIP pads with the token 0, CLIP with the end token
KEPT = ("first_stage.latent_mean", "first_stage.latent_std")  # float32 whatever the weights are


def read(path: Path, weights: str = "ema", prediction: str | None = None, kind: str | None = None) -> Package:
    """The model at a path, of whatever format; UserError where it is none, or not of `kind`.

    weights: `ema` or `raw`, where both are there. prediction: "epsilon" or "v", for a single file that does not tell.
    kind: "first_stage" or "diffusion", which of a run's models is meant; None: the last.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights={weights}: expected ema or raw")
    if not path.exists():
        raise UserError(f"{path}: nothing is there; give a file, a diffusers folder, or a model folder of this project")
    if path.is_file():
        return read_single_file(path, weights, PREDICTIONS[prediction] if prediction else None)
    if is_diffusers(path):
        return read_diffusers(path)
    wanted = [kind] if kind else ["diffusion", "first_stage"]
    for last, one in enumerate(wanted, start=1):
        try:
            folder = find_model_folder(path, one)
        except UserError:
            if last == len(wanted):
                raise
            continue
        folder.verify()
        return package_of(folder, weights)
    raise AssertionError("unreachable")


def cast(package: Package, dtype: torch.dtype) -> Package:
    """The package with its weights in a floating-point type; latent statistics stay float32."""

    def one(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and name not in KEPT else tensor

    return package.with_state({name: one(name, tensor) for name, tensor in package.state.items()})


def with_tokenizers(package: Package, name_or_path: str) -> Package:
    """The package with a tokenizer for each text encoder, CLIP's where it brings none; OpenCLIP's pad differs."""
    if len(package.tokenizers) < len(package.architecture.texts):
        pads = [OPEN_CLIP_PAD if text.config["act"] == "gelu" else None for text in package.architecture.texts]
        package.tokenizers = [load_tokenizer(name_or_path, pad=pad) for pad in pads]
    return package


def convert(
    source: Path,
    out: Path,
    to: str,
    weights: str = "ema",
    dtype: str | None = None,
    prediction: str | None = None,
    tokenizer: str = CLIP,
) -> None:
    """Writes the model at `source` to `out` in another format, whole or not at all; UserError where it cannot be."""
    if out.exists():
        raise UserError(f"{out} exists already; give another place, or remove it first")
    package = read(source, weights, prediction)
    if dtype is not None:
        package = cast(package, DTYPES[dtype])
    if to != "single_file":
        package = with_tokenizers(package, tokenizer)
    FORMATS[to](package, out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ldm.interop.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", type=Path, help="a run, stage, model or diffusers folder, or a file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file or folder to write")
    parser.add_argument("--to", required=True, choices=list(FORMATS), help="the format to write")
    parser.add_argument("--weights", default="ema", choices=("ema", "raw"), help="which, where there are both (ema)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights; default: as they are")
    parser.add_argument("--prediction", choices=list(PREDICTIONS), help="where a file does not tell (SD 2: v)")
    parser.add_argument("--tokenizer", default=CLIP, help=f"folder or hub name, where IN brings none ({CLIP})")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ldm.interop.convert IN OUT --to FORMAT`; status 1, and nothing written, where it cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        convert(
            options.source,
            options.out,
            options.to,
            options.weights,
            options.dtype,
            options.prediction,
            options.tokenizer,
        )
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{options.out} written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
