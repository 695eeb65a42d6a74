"""The provenance record: canonical text, dotted names, what may differ, files that were changed."""

import json
from pathlib import Path
from typing import Any

import pytest

from ldm.errors import UserError
from ldm.evaluation.protocol import (
    Protocol,
    Result,
    Value,
    canonical,
    differences,
    digest,
    numeric_versions,
    require_comparable,
)


def protocol(**changes: Any) -> Protocol:
    given: dict[str, Any] = {
        "task": "text_to_image", "reference": "r", "prompts": "p", "weights": "w", "ema": True,
        "metrics": {"FID": "inception@1"}, "n_images": 10, "seed": 0, "size": (64, 64),
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return Protocol(**(given | changes))


def test_the_canonical_text_does_not_depend_on_order() -> None:
    assert canonical({"b": 1, "a": [1.5, None, True]}) == '{"a":[1.5,null,true],"b":1}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    with pytest.raises(UserError, match="plain JSON"):
        canonical({"a": float("nan")})
    with pytest.raises(UserError, match="plain JSON"):
        canonical({"a": object()})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"weights": "v"}, "weights"),
        ({"size": (64, 32)}, "size"),
        ({"metrics": {"FID": "inception@2"}}, "metrics.FID"),
        ({"versions": {"torch": "2.11.0"}}, "versions.torch"),
        ({"versions": {}}, "versions.torch"),
        ({"steps": 50}, "steps"),
        ({"guidance_scale": 0.0}, "guidance_scale"),
    ],
)
def test_every_difference_is_named_and_changes_the_digest(changes: dict[str, Any], name: str) -> None:
    a, b = protocol(), protocol(**changes)
    assert differences(a, b) == differences(b, a) == [name]
    assert a.digest() != b.digest()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        require_comparable([Result(a, {}), Result(b, {})])


def test_declared_axes_may_differ_and_unknown_ones_are_named() -> None:
    results = [Result(protocol(guidance_scale=g, weights=w), {}) for g in (1.0, 3.0) for w in ("a", "b")]
    require_comparable(results, ("guidance_scale", "weights"))
    with pytest.raises(UserError, match="weights: a and b"):
        require_comparable(results, ("guidance_scale",))
    with pytest.raises(UserError, match="did you mean guidance_scale"):
        require_comparable(results, ("guidance_scal",))
    with pytest.raises(UserError, match="no results"):
        require_comparable([])


def test_a_result_reads_back_exactly(tmp_path: Path) -> None:
    result = Result(
        protocol(guidance_scale=0.1 + 0.2), {"FID": Value(1 / 3, 0.1, 0.5), "clip_score": Value(30.0, unit="share")}
    )
    result.write(tmp_path / "a" / "result.json")
    assert Result.read(tmp_path / "a" / "result.json") == result
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result.json"]


@pytest.mark.parametrize("key", ["seed", "weights", "reference"])
def test_an_edited_protocol_breaks_the_provenance(tmp_path: Path, key: str) -> None:
    path = tmp_path / "result.json"
    Result(protocol(), {"FID": Value(5.0)}).write(path)
    data = json.loads(path.read_text())
    data["protocol"][key] = "other"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="changed after it was written"):
        Result.read(path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"provenance": 1'])
def test_other_files_are_no_results(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError):
        Result.read(tmp_path / "x.json")
    with pytest.raises(UserError):
        Result.read(tmp_path / "missing.json")


def test_versions_name_what_computes() -> None:
    assert {"python", "torch", "ldm", "transformers"} <= set(numeric_versions())
