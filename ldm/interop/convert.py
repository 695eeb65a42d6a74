"""Weights from one format to another: python -m ldm.interop.convert IN OUT --to diffusers|single_file|ldm

IN is a run's folder, a stage's or a model folder of this project, a diffusers folder, or a single file in CompVis' or
sgm's layout (.safetensors, .ckpt); what it holds is recognised from its contents. OUT must not exist.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ldm.errors import UserError
from ldm.interop import nodes
from ldm.interop.diffusers_folder import (
    is_diffusers,
    is_first_stage_file,
    read_diffusers,
    read_first_stage,
    write_diffusers,
)
from ldm.interop.model_folder import RECORD, ModelFolder, find_any_model_folder, find_model_folder
from ldm.interop.own_folder import portable, read_model_folder, write_own
from ldm.interop.package import Package, require_finite
from ldm.interop.single_file import PREDICTIONS, read_single_file, write_single_file
from ldm.interop.statistics import SD_FACTOR, SDXL_FACTOR
from ldm.interop.tokenizers import load_tokenizer

Write = Callable[[Package, Path], None]
FORMATS: dict[str, Write] = {"diffusers": write_diffusers, "single_file": write_single_file, "ldm": write_own}
FILE = ".safetensors"
FILES = (FILE, ".ckpt", ".pt", ".pth", ".bin")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CLIP = "openai/clip-vit-large-patch14"
OPEN_CLIP_PAD = "!"  # OpenCLIP pads with the token 0, CLIP with the end token


def read(path: Path, weights: str = "ema", prediction: str | None = None, kind: str | None = None) -> Package:
    """The model at a path, of whatever format; UserError where there is none.

    weights: `ema` or `raw`, where both are there. prediction: "epsilon" or "v", for a single file that does not say it.
    kind: "first_stage" (which may be the one in a diffusion model) or "diffusion", of a run's models; None: the last.
    """
    _require("weights", weights, ("ema", "raw"))
    if prediction is not None:
        _require("prediction", prediction, PREDICTIONS)
    if not path.exists():
        raise UserError(f"{path}: nothing is there; give a file, a diffusers folder, or a model folder of this project")
    try:
        package = _read(path, weights, prediction, kind)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if prediction is not None and package.kind == "first_stage":
        raise UserError(f"--prediction {prediction}: {path} holds a first stage alone, which has no prediction")
    if prediction is not None and package.prediction != PREDICTIONS[prediction].__name__:
        raise UserError(
            f"--prediction {prediction}: {path} says that its UNet predicts {package.prediction}; leave the option "
            "out, it is for files that do not say it"
        )
    require_finite(package)
    return package.first_stage if kind == "first_stage" else package


def _read(path: Path, weights: str, prediction: str | None, kind: str | None) -> Package:
    if path.is_file() and (path.parent / RECORD).is_file():
        raise UserError(f"{path} is a part of the model folder {path.parent}: give the folder")
    if path.is_file():
        if is_first_stage_file(path):
            return read_first_stage(path.parent, path)
        return read_single_file(path, weights, prediction)
    if is_diffusers(path):
        return read_diffusers(path, weights == "raw")
    folder = _find(path, kind)
    folder.verify()
    return read_model_folder(folder, weights)


def _find(path: Path, kind: str | None) -> ModelFolder:
    """The model folder that is meant; for a first stage also that of the diffusion model that it is in."""
    if kind is None:
        return find_any_model_folder(path)
    try:
        return find_model_folder(path, kind)
    except UserError:
        if kind == "first_stage":
            with suppress(UserError):
                return find_model_folder(path, "diffusion")
        raise


def _require(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value}: expected {' or '.join(allowed)}")


def cast(package: Package, dtype: torch.dtype) -> Package:
    """The package with its weights in a floating-point type; latent statistics stay float32.

    UserError where a weight is larger than the type's numbers.
    """
    prefix = nodes.first_stage_prefix(package.model)
    statistics = {prefix + name for name in nodes.STATISTICS}

    def one(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or name in statistics:
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
    encoders = [text["encoder"] for text in nodes.texts(package.model).values()]
    if len(package.tokenizers) == len(encoders):
        return package
    pads = [OPEN_CLIP_PAD if encoder["act"] == "gelu" else None for encoder in encoders]
    tokenizers = [
        load_tokenizer(name_or_path, pad=pad, most=encoder["vocab"])
        for pad, encoder in zip(pads, encoders, strict=True)
    ]
    return replace(package, tokenizers=tokenizers)


def with_scale_factor(package: Package, factor: float | None) -> Package:
    """The package with the latent scale factor that its source does not say; UserError where it does."""
    if package.has_latent_stats and factor is None:
        return package
    if package.has_latent_stats:
        raise UserError(
            f"--scale-factor {factor}: {package.origin} says what its latents are normalised by; leave the option out, "
            "it is for first stages that do not say it"
        )
    if factor is None:
        note = (
            f"{package.origin} does not say what its latents are normalised by: give --scale-factor ({SD_FACTOR} for "
            f"a first stage of SD 1 or 2, {SDXL_FACTOR} for SDXL's) where OUT has to; it is 1 now"
        )
        return replace(package, notes=[*package.notes, note])
    if not 0.0 < factor < float("inf"):
        raise UserError(f"--scale-factor {factor}: expected a number above 0")
    std = torch.full_like(package.state["latent_std"], 1.0 / factor)
    return replace(package, state={**package.state, "latent_std": std}, has_latent_stats=True)


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
    _require("to", to, FORMATS)
    if dtype is not None:
        _require("dtype", dtype, DTYPES)
    _require_free(out, to)
    package = with_scale_factor(portable(read(source, weights or "ema", prediction)), scale_factor)
    if weights == "ema" and not package.averaged:
        package.notes.append(f"{source} has one kind of weights alone, which were used")
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
    created = [folder for folder in out.parents if not folder.exists()]
    try:
        FORMATS[to](package, out)
    except (OSError, SafetensorError, UserError) as error:
        for folder in created:  # the deepest first
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
    parser.add_argument("--prediction", choices=list(PREDICTIONS), help="where a file does not say it (SD 2: v)")
    parser.add_argument("--tokenizer", help=f"folder or hub name, where IN brings none ({CLIP})")
    parser.add_argument("--scale-factor", type=float, help="of the latents, where a first stage does not say it")
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
