"""Versions of Python, the packages and this code, and the device's name: what is written next to an output."""

import json
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ldm.checkpoint import write_atomic

PACKAGES = (
    "ldm",
    "torch",
    "pytorch-lightning",
    "hydra-core",
    "omegaconf",
    "transformers",
    "tokenizers",
    "webdataset",
    "torchmetrics",
    "safetensors",
    "numpy",
    "pillow",
    "wandb",
)
ROOT = Path(__file__).resolve().parents[1]


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The versions of Python and of the packages by name; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@cache
def versions() -> dict[str, str | None]:
    """The versions by package, read once in a process; `commit` is None outside a git checkout."""
    return package_versions(PACKAGES) | {"commit": _commit(ROOT), "device": _device()}


def write_versions(folder: Path) -> None:
    """Writes `folder/versions.json`."""
    with write_atomic(folder / "versions.json") as temporary:
        temporary.write_text(json.dumps(versions(), indent=2) + "\n")


def _commit(root: Path) -> str | None:
    """The commit that is checked out, with "-dirty" appended where tracked files differ from it."""
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or a checkout that it refuses


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
