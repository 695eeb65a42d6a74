"""The frozen parts of what is trained: a checkpoint names them, by origin and fingerprint, and holds no copy."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ldm.checkpoint import fingerprint
from ldm.errors import UserError

KEY = "frozen"


@dataclass(frozen=True)
class FrozenPart:
    """Where a part's weights were read (a path or a hub name, "" where nobody knows), and which they are."""

    origin: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.fingerprint} from {self.origin or 'no file'}"


def frozen_parts(module: nn.Module) -> dict[str, FrozenPart]:
    """The outermost submodules, by name, that have parameters, train none, and are in evaluation mode throughout.

    One that is in training mode may change by itself (batch statistics), so it is not frozen.
    """
    found: dict[str, FrozenPart] = {}
    for name, part in module.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters) and not any(m.training for m in part.modules()):
            found[name] = FrozenPart(_origin(part), fingerprint(part.state_dict()))
    return found


def note_origin(module: nn.Module, origin: str) -> None:
    """Notes where the weights of a module, and so of its parts, were read."""
    for part in module.modules():
        part.__dict__["origin"] = origin


def _origin(part: nn.Module) -> str:
    """What was noted, or a transformers model's own note."""
    return str(getattr(part, "origin", "") or getattr(part, "name_or_path", ""))


def leave_out(checkpoint: dict[str, Any], parts: Mapping[str, FrozenPart]) -> None:
    """Takes the frozen parts' weights out of Lightning's checkpoint and names the parts under `frozen`."""
    checkpoint[KEY] = {name: asdict(part) for name, part in parts.items()}
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not _within(k, parts)}


def put_back(checkpoint: dict[str, Any], parts: Mapping[str, FrozenPart], own: Mapping[str, Any]) -> None:
    """Puts the module's `own` frozen weights into a checkpoint that left them out, so that it is complete.

    Raises UserError where the module's frozen parts are not those that the checkpoint was trained with.
    """
    saved = {name: FrozenPart(**part) for name, part in checkpoint.get(KEY, {}).items()}
    for name in sorted({*saved, *parts}):
        then, now = saved.get(name), parts.get(name)
        if then is None or now is None or then.fingerprint != now.fingerprint:
            raise UserError(
                f"the checkpoint was trained with another {name}: then {then or 'not frozen, or not there'}; now "
                f"{now or 'not frozen, or not there'}. Give the weights and settings that it was trained with, or "
                "start a new run"
            )
    checkpoint["state_dict"] |= {name: tensor for name, tensor in own.items() if _within(name, parts)}


def _within(name: str, parts: Mapping[str, FrozenPart]) -> bool:
    return any(name.startswith(f"{part}.") for part in parts)
