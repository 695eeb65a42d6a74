"""The versions that are written next to an output."""

import json
import subprocess
from pathlib import Path

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


def test_only_a_checkout_has_a_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        user = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *user, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert module._commit(tmp_path) is None
    git("init")
    assert module._commit(tmp_path) is None  # without a commit git fails
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "-m", "a tag", "v1")
    head = git("rev-parse", "HEAD")
    (tmp_path / "untracked").touch()
    assert module._commit(tmp_path) == head
    (tmp_path / "file").write_text("22")
    assert module._commit(tmp_path) == f"{head}-dirty"
