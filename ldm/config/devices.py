"""Which devices a command runs on."""

import os

import torch
from omegaconf import DictConfig

from ldm.errors import UserError


def pick_device(device: str) -> torch.device:
    """The device that a name means; "auto" is the first GPU, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty((), device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} is not available here: {str(error).splitlines()[0]}") from error


def devices_of(device: str, count: int) -> list[str]:
    """The names of `count` devices; UserError where there are fewer."""
    first = pick_device(device)
    there = torch.cuda.device_count() if first.type == "cuda" else os.cpu_count() or 1
    if not isinstance(count, int) or not 1 <= count <= there:
        kind = "GPUs" if first.type == "cuda" else "CPU cores (no GPU is in use)"
        raise UserError(f"devices={count}: this machine has {there} {kind}; give 1 to {there}")
    if count == 1:
        return [str(first)]
    return [f"cuda:{i}" for i in range(count)] if first.type == "cuda" else [str(first)] * count


def check_devices(trainer: DictConfig) -> None:
    """Raises UserError where another accelerator or more devices are asked for than this machine has."""
    devices, accelerator = trainer.devices, str(trainer.accelerator)
    gpus = torch.cuda.device_count()
    wants_gpu = accelerator in ("gpu", "cuda")
    if wants_gpu and not gpus:
        raise UserError(f"trainer.accelerator={accelerator}: torch finds no GPU on this machine; give cpu or auto")
    if not isinstance(devices, int) or devices < 1:
        return  # "auto", -1, or a list: Lightning's to judge
    on_gpu = wants_gpu or (accelerator == "auto" and gpus > 0)
    there = gpus if on_gpu else os.cpu_count() or 1
    if devices > there:
        kind = "GPUs" if on_gpu else "CPU cores (no GPU is in use)"
        raise UserError(f"trainer.devices={devices}: this machine has {there} {kind}; give at most {there}")
