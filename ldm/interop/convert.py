"""Weights from one format to another: python -m ldm.interop.convert IN OUT --to diffusers|single_file|ldm

IN is a run's folder, a stage's or a model folder of this project, a diffusers folder, or a single file in CompVis' or
sgm's layout (.safetensors, .ckpt); what it holds is recognised from its contents. OUT must not exist.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ldm.errors import UserError
from ldm.interop.diffusers_folder import (
    is_diffusers,
    is_first_stage_file,
    read_diffusers,
    read_first_stage_file,
    write_diffusers,
)
from ldm.interop.model_folder import RECORD, find_any_model_folder, find_model_folder
from ldm.interop.own_folder import load_tokenizer, package_of, write_own
from ldm.interop.package import Package, require_finite
from ldm.interop.single_file import SD_FACTOR, SDXL_FACTOR, read_single_file, write_single_file

Write = Callable[[Package, Path], None]
FORMATS: dict[str, Write] = {"diffusers": write_diffusers, "single_file": write_single_file, "ldm": write_own}
FILE = ".safetensors"
FILES = (FILE, ".ckpt", ".pt", ".pth", ".bin")
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
    _chosen("weights", weights, ("ema", "raw"))
    if prediction is not None:
        _chosen("prediction", prediction, PREDICTIONS)
    if not path.exists():
        raise UserError(f"{path}: nothing is there; give a file, a diffusers folder, or a model folder of this project")
    predicted = PREDICTIONS[prediction] if prediction else None
    try:
        package = _read(path, weights, predicted, kind)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if predicted is not None and package.kind == "first_stage":
        raise UserError(f"--prediction {prediction}: {path} holds a first stage alone, which has no prediction")
    if predicted is not None and package.architecture.prediction != predicted:
        raise UserError(
            f"--prediction {prediction}: {path} says that its UNet predicts {package.architecture.prediction}; leave "
            "the option away, it is for files that do not tell"
        )
    require_finite(package, str(path))
    return package


def _read(path: Path, weights: str, prediction: str | None, kind: str | None) -> Package:
    if path.is_file() and (path.parent / RECORD).is_file():
        raise UserError(f"{path} is a part of the model folder {path.parent}: give the folder")
    if path.is_file():
        beside = is_first_stage_file(path)
        return read_first_stage_file(path) if beside else read_single_file(path, weights, prediction)
    if is_diffusers(path):
        return read_diffusers(path, weights == "raw")
    folder = find_model_folder(path, kind) if kind else find_any_model_folder(path)
    folder.verify()
    return package_of(folder, weights)


def _chosen(name: str, given: str, allowed: Sequence[str] | Mapping[str, Any]) -> None:
    if given not in allowed:
        raise UserError(f"{name}={given}: expected {' or '.join(allowed)}")


def cast(package: Package, dtype: torch.dtype) -> Package:
    """The package with its weights in a floating-point type; latent statistics stay float32.

    UserError where a weight is larger than the type's numbers.
    """

    def one(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or name in KEPT:
            return tensor
        most = float(tensor.to(torch.float32).abs().max()) if tensor.numel() else 0.0
        if most > torch.finfo(dtype).max:
            raise UserError(
                f"{name} goes up to {most:.4g}, which {dtype} cannot hold; give --dtype bfloat16 or float32"
            )
        return tensor.to(dtype)

    return package.with_state({name: one(name, tensor) for name, tensor in package.state.items()})


def with_tokenizers(package: Package, name_or_path: str) -> Package:
    """The package with a tokenizer for each text encoder, CLIP's where it brings none; OpenCLIP's pad differs."""
    if len(package.tokenizers) < len(package.architecture.texts):
        package.tokenizers = [
            load_tokenizer(name_or_path, pad=OPEN_CLIP_PAD if text.config["act"] == "gelu" else None, most=text.vocab)
            for text in package.architecture.texts
        ]
    return package


def with_scale_factor(package: Package, factor: float | None, origin: Path) -> Package:
    """The package with the latent scale factor that its source does not tell; UserError where it does."""
    if package.latents_told:
        if factor is not None:
            raise UserError(
                f"--scale-factor {factor}: {origin} says what its latents are normalised by; leave the option away, it "
                "is for first stages that do not tell"
            )
        return package
    if factor is None:
        note = (
            f"{origin} does not say what its latents are normalised by: give --scale-factor ({SD_FACTOR} for a first "
            f"stage of SD 1 or 2, {SDXL_FACTOR} for SDXL's) where OUT has to; 1 stands there now"
        )
        package.notes.append(note)
        return package
    if not 0.0 < factor < float("inf"):
        raise UserError(f"--scale-factor {factor}: expected a number above 0")
    std = torch.full_like(package.state["first_stage.latent_std"], 1.0 / factor)
    package.latents_told = True
    return package.with_state({**package.state, "first_stage.latent_std": std})


def convert(
    source: Path,
    out: Path,
    to: str,
    weights: str | None = None,
    dtype: str | None = None,
    prediction: str | None = None,
    tokenizer: str | None = None,
    scale_factor: float | None = None,
) -> list[str]:
    """Writes the model at `source` to `out` in another format, whole or not at all; what had to be assumed.

    UserError where it cannot be, and nothing is written.
    """
    _chosen("to", to, FORMATS)
    if dtype is not None:
        _chosen("dtype", dtype, DTYPES)
    _require_free(out, to)
    package = with_scale_factor(read(source, weights or "ema", prediction), scale_factor, source)
    if weights == "ema" and not package.averaged:
        package.notes.append(f"{source} has one kind of weights alone, which were taken")
    if tokenizer is not None and package.tokenizers:
        package.notes.append(f"{source} brings its own tokenizer; {tokenizer} was not used")
    if dtype is not None:
        package = cast(package, DTYPES[dtype])
    if to != "single_file" or tokenizer is not None:
        package = with_tokenizers(package, tokenizer or CLIP)
    _write(package, out, to)
    return package.notes


def _require_free(out: Path, to: str) -> None:
    """UserError where OUT is there already, or its name is not one of the format's."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; give another place, or remove it first")
    if to == "single_file" and out.suffix != FILE:
        raise UserError(f"{out}: a single file is written as safetensors; give a name that ends in {FILE}")
    if to != "single_file" and out.suffix in FILES:
        raise UserError(f"{out}: --to {to} writes a folder; give a name without {out.suffix}, or --to single_file")


def _write(package: Package, out: Path, to: str) -> None:
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        FORMATS[to](package, out)
    except (OSError, SafetensorError, UserError) as error:
        for folder in made:  # the deepest first
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, UserError):
            raise
        raise UserError(f"{out} cannot be written: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ldm.interop.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", type=Path, help="a run, stage, model or diffusers folder, or a file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file or folder to write")
    parser.add_argument("--to", required=True, choices=list(FORMATS), help="the format to write")
    parser.add_argument("--weights", choices=("ema", "raw"), help="which, where there are both (ema)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights; default: as they are")
    parser.add_argument("--prediction", choices=list(PREDICTIONS), help="where a file does not tell (SD 2: v)")
    parser.add_argument("--tokenizer", help=f"folder or hub name, where IN brings none ({CLIP})")
    parser.add_argument("--scale-factor", type=float, help="of the latents, where a first stage does not tell")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ldm.interop.convert IN OUT --to FORMAT`; status 1, and nothing written, where it cannot be done."""
    options = vars(_parser().parse_args(arguments))
    try:
        notes = convert(**options)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    sys.stdout.write(f"{options['out']} written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
