"""The folder of a run: a new one, or the one that `resume` names."""

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm.config.run_folder import register_resolvers


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of `mine`, a folder beside them that is not a run, and one run of another name."""
    for name in ("mine/2024-01-01", "mine/2024-01-02", "other/2024-01-03"):
        (tmp_path / "outputs" / name / ".hydra").mkdir(parents=True)
    (tmp_path / "outputs" / "mine" / "scores").mkdir()
    (tmp_path / "outputs" / "mine" / "2024-01-01" / "base" / "checkpoints" / "step_1").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "resume", "expected"),
    [
        ("mine", None, "outputs/mine/now"),
        ("mine", "auto", "outputs/mine/2024-01-02"),
        ("new", "auto", "outputs/new/now"),
        ("mine", "outputs/mine/2024-01-01", "outputs/mine/2024-01-01"),
        ("mine", "outputs/mine/2024-01-01/base/checkpoints/step_1", "outputs/mine/2024-01-01"),
        ("new", "outputs/other/2024-01-03", "outputs/other/2024-01-03"),
        ("mine", "elsewhere", "outputs/mine/now"),  # which is then refused
    ],
)
def test_a_runs_folder(name: str, resume: str | None, expected: str, outputs: Path) -> None:
    register_resolvers()
    node = {"name": name, "resume": resume, "folder": "${run_dir:outputs,${name},now,${resume}}"}
    assert os.path.normpath(OmegaConf.create(node).folder) == expected
