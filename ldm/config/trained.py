"""Until the merge: what ldm/commands/evaluate.py reads of a trained model, in terms of ldm/config/build.py."""

from collections.abc import Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from ldm.config import build as parts
from ldm.config.build import Trained, warn_without_dropout
from ldm.config.compose import CONFIGS
from ldm.data.loading.fetch import View
from ldm.errors import UserError, nearest
from ldm.generation import SamplingSettings

__all__ = ["Trained", "load_trained", "merge_sampling", "sampling_settings", "trained_size", "warn_without_dropout"]


def options(group: str) -> list[str]:
    return [path.stem for path in sorted((CONFIGS / group).glob("*.yaml"))]


def load_option(group: str, name: str) -> DictConfig:
    if name not in options(group):
        raise UserError(f"{group}={name}: there is no such {group}; {nearest(name, options(group))}")
    return cast(DictConfig, OmegaConf.load(CONFIGS / group / f"{name}.yaml"))


def load_trained(checkpoint: str, weights: str, device: str) -> Trained:
    trained = parts.load_trained(checkpoint, weights, device)
    names = ("sampler", "grid", "guidance", "steps", "guidance_scale")
    trained.config.sampling = {name: trained.config.samples[name] for name in names}
    return trained


def trained_size(trained: Trained, size: Any) -> tuple[int, int]:
    height, width = View.of(trained.config.data.size if size is None else size).size
    trained.model.first_stage.check_size(height, width)
    return height, width


def merge_sampling(default: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = {name: _plain(default[name]) for name in default}
    for name, value in changes.items():
        new = _plain(value)
        if isinstance(new, dict) and "_target_" not in new:
            merged[name] = merged[name] | new
        elif new is not None:
            merged[name] = new
    return merged


def sampling_settings(sampling: Mapping[str, Any]) -> SamplingSettings:
    node = OmegaConf.create({**sampling, "guidance": _with_scale(sampling["guidance"])})
    return parts.sampling_settings(node, sampling["guidance_scale"])


def _plain(value: Any) -> Any:
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return _without_scale(plain)


def _without_scale(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {name: _without_scale(value) for name, value in node.items() if name != "scale"}


def _with_scale(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    inner = {name: _with_scale(value) for name, value in node.items()}
    leads = str(node.get("_target_", "")).endswith((".ClassifierFree", ".Projected"))
    return inner | ({"scale": "${guidance_scale}"} if leads else {})
