"""The provenance record of a result: all that it depends on, written with it; results that differ are not mixed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from ldm.checkpoint import write_atomic
from ldm.errors import UserError, nearest
from ldm.versions import package_versions

FORMAT = 2
PACKAGES = ("ldm", "torch", "transformers", "torchmetrics", "numpy", "scipy", "pillow")


def numeric_versions() -> dict[str, str]:
    """The versions of Python and of the packages that numbers may depend on."""
    return {name: version or "not installed" for name, version in package_versions(PACKAGES).items()}


def canonical(data: Any) -> str:
    """The one JSON text of plain data: sorted keys, no spaces. UserError for NaN and for other types."""
    try:
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"a result is written as plain JSON data without NaN: {error}") from error


def digest(data: Any) -> str:
    """The SHA-256 of the canonical JSON of plain data, e.g. of a list of prompts; 64 hexadecimal digits."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that a result depends on. None where a field does not apply."""

    task: str  # "text_to_image", "reconstruction", ...
    reference: str | None  # fingerprint of the reference set and how it was prepared
    prompts: str | None  # digest of the prompts in order
    weights: str  # fingerprint of the model's weights
    ema: bool
    metrics: Mapping[str, str]  # by name: network, weights and resize; Features.description and the like
    n_images: int
    seed: int  # picture i has seed + i
    size: tuple[int, int]  # (H, W) of the images
    sampler: str | None = None
    grid: str | None = None
    steps: int | None = None
    guidance: str | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    precision: str = "32-true"
    versions: Mapping[str, str] = field(default_factory=numeric_versions)

    def fields(self) -> dict[str, Any]:
        """The fields as plain data; those of mappings under dotted names, e.g. "versions.torch"."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, Mapping):
                flat |= {f"{name}.{key}": item for key, item in value.items()}
            else:
                flat[name] = list(value) if isinstance(value, tuple) else value
        return flat

    def digest(self) -> str:
        """64 hexadecimal digits that two protocols share only where all their fields agree."""
        return digest(self.fields())


class Value(NamedTuple):
    """A measured number and, where known, its 95 % confidence interval.

    `unit` "share" is a fraction in [0, 1], which tables and plots show in per cent; None is a plain number.
    A named tuple, so that `torchmetrics.Metric.compute` may return it.
    """

    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Result:
    """The values of a model under a protocol, by metric name."""

    protocol: Protocol
    metrics: Mapping[str, Value]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data; `provenance` is the digest of all the rest."""
        protocol = asdict(self.protocol) | {"size": list(self.protocol.size)}
        metrics = {name: value._asdict() for name, value in self.metrics.items()}
        content = {"format": FORMAT, "protocol": protocol, "metrics": metrics}
        return content | {"provenance": digest(content)}

    def write(self, path: str | Path) -> None:
        """Write the result with its provenance record as JSON, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        with write_atomic(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The result in a file; UserError where it was edited after it was written."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise UserError(f"{path} has format {data['format']}, this version reads {FORMAT}; evaluate again")
            recorded = data.pop("provenance")
            if recorded != digest(data):
                raise UserError(f"{path} was changed after it was written (its provenance differs); evaluate again")
            protocol = data["protocol"] | {"size": tuple(data["protocol"]["size"])}
            metrics = {name: Value(**value) for name, value in data["metrics"].items()}
        except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a result of an evaluation ({type(error).__name__}: {error})") from error
        return cls(Protocol(**protocol), metrics)


def differences(a: Protocol, b: Protocol) -> list[str]:
    """The names of the fields in which two protocols differ."""
    left, right = a.fields(), b.fields()
    names = [*left, *(name for name in right if name not in left)]
    missing = object()
    return [name for name in names if left.get(name, missing) != right.get(name, missing)]


def require_comparable(results: Sequence[Result], axes: Sequence[str] = ()) -> None:
    """UserError that names the fields in which results differ besides the declared axes, and their values."""
    if not results:
        raise UserError("there are no results to compare")
    first = results[0].protocol
    for axis in axes:
        if axis not in first.fields():
            raise UserError(f"results have no field {axis!r}: {nearest(axis, first.fields())}")
    for other in results[1:]:
        undeclared = [name for name in differences(first, other.protocol) if name not in axes]
        if undeclared:
            left, right = first.fields(), other.protocol.fields()
            fields = "; ".join(f"{name}: {left.get(name)} and {right.get(name)}" for name in undeclared)
            raise UserError(
                f"results of different protocols cannot be compared: {fields}. Evaluate them alike, or declare what is "
                "meant to differ as an axis"
            )
