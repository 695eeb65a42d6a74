"""The versions that are written next to an output."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from ldm import versions as module
from ldm.versions import versions, write_versions


def test_they_tell_packages_commit_and_device(tmp_path: Path) -> None:
    write_versions(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "versions.json").read_text())
    assert found == versions()
    assert found["torch"] == torch.__version__
    assert {"python", "pytorch-lightning", "hydra-core", "transformers", "webdataset", "ldm"} <= found.keys()
    assert found["device"]


def test_only_a_checkout_has_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._commit(tmp_path) is None
    (tmp_path / ".git").mkdir()
    answers = {"rev-parse": "a" * 40, "status": ""}
    monkeypatch.setattr(module, "_git", lambda root, command, *rest: answers[command])
    assert module._commit(tmp_path) == "a" * 40
    answers["status"] = " M ldm/errors.py"
    assert module._commit(tmp_path) == "a" * 40 + "-dirty"

    def fail(*args: object) -> str:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(module, "_git", fail)
    assert module._commit(tmp_path) is None
