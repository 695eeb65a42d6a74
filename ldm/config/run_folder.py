"""The folder of a run, and the resolvers by which the configurations name it."""

import os
from pathlib import Path

from omegaconf import OmegaConf

from ldm.config.processes import agreed


def register_resolvers() -> None:
    """Makes `${run_dir:...}`, `${sweep_dir:...}` and `${multiply:...}` known to OmegaConf."""
    OmegaConf.register_new_resolver("run_dir", lambda *given: agreed("run", _run_dir(*given)), replace=True)
    OmegaConf.register_new_resolver("sweep_dir", lambda folder: agreed("sweep", folder), replace=True)
    OmegaConf.register_new_resolver("multiply", lambda a, b: a * b, replace=True)


def _run_dir(root: str, name: str, time: str, resume: str | None) -> str:
    """The run's folder: a new one, or with resume=auto the newest there is, or with resume=PATH that one's."""
    fresh = os.path.join(root, name, time)
    if resume is None:
        return fresh
    if resume == "auto":
        runs = [folder for folder in Path(root, name).glob("*") if (folder / ".hydra").is_dir()]
        return str(max(runs, key=lambda folder: folder.name)) if runs else fresh
    path = Path(resume).absolute()
    for folder in (path, *list(path.parents)[:3]):
        if (folder / ".hydra").is_dir():
            return os.path.relpath(folder)
    return fresh  # train.py then refuses the path
