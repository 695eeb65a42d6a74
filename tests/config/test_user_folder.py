"""A user's own config folder next to the shipped configurations."""

from pathlib import Path

import pytest
from hydra import initialize_config_dir

from ldm.config.compose import CONFIGS, compose, load_option
from ldm.errors import UserError


def folder(path: Path, files: dict[str, str]) -> str:
    """The override that puts a folder with these files on the search path."""
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return f"hydra.searchpath=[file://{path}]"


def test_an_option_of_a_users_folder_is_chosen_like_a_shipped_one(tmp_path: Path) -> None:
    own = folder(tmp_path, {"optimizer/sgd.yaml": "_target_: torch.optim.SGD\n_partial_: true\nlr: 0.5\n"})
    cfg = compose("train", [own, "experiment=quickstart", "optimizer=sgd", "optimizer.momentum=0.9"])
    assert (cfg.optimizer._target_, cfg.optimizer.lr, cfg.optimizer.momentum) == ("torch.optim.SGD", 0.5, 0.9)


@pytest.mark.parametrize("file", ["optimizer/adamw.yaml", "callbacks/ema.yaml", "experiment/quickstart.yaml"])
def test_an_option_that_a_shipped_one_would_hide_is_refused(file: str, tmp_path: Path) -> None:
    own = folder(tmp_path, {file: "name: {}\n"})
    with pytest.raises(UserError, match=f"{file} is in .*{tmp_path}"):
        compose("train", [own, "experiment=quickstart", "callbacks=[ema,checkpoints]"])


def test_a_knob_inside_a_list_of_parts() -> None:
    common = ["experiment=sd1", "conditioner=sdxl", "network=sdxl"]
    cfg = compose(
        "train", [*common, "conditioner.conditioners.1.max_length=64", "conditioner.conditioners.0.mask=true"]
    )
    first, second = cfg.conditioner.conditioners[:2]
    assert (first.max_length, first.mask, second.max_length) == (77, True, 64)
    for knob in ("conditioners.1.max_lenght", "conditioners.9.max_length"):
        with pytest.raises(UserError, match=knob):
            compose("train", [*common, f"conditioner.{knob}=64"])
    with pytest.raises(UserError, match=r"curriculum\.base\.conditioner\.conditioners\.0\.dropout"):
        compose("train", [*common, "curriculum.base.conditioner.conditioners.0.dropout=0.5"])


def test_a_task_builds_on_another_task_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "task"
    own.mkdir()
    monkeypatch.setattr("ldm.config.compose.CONFIGS", tmp_path)
    (own / "base.yaml").write_text("_target_: mine.Base\nseed: 3\n")
    (own / "mine.yaml").write_text("defaults: [base]\n_target_: mine.Task\nscale: 2.0\n")
    assert load_option("task", "mine") == {"_target_": "mine.Task", "seed": 3, "scale": 2.0}
    (own / "other.yaml").write_text("defaults: [base, /network@network: small]\n_target_: mine.Task\n")
    with pytest.raises(UserError, match=r"task/other\.yaml.*options of task only"):
        load_option("task", "other")


@pytest.mark.parametrize("group", ["callbacks", "logger"])
def test_two_files_that_define_one_name_are_refused(group: str, tmp_path: Path) -> None:
    shipped = {"callbacks": "ema", "logger": "csv"}[group]
    own = folder(tmp_path, {f"{group}/mine.yaml": f"{shipped}:\n  _target_: mine.Own\n"})
    with pytest.raises(UserError, match=rf"{group}\.{shipped}: .*{group}/{shipped}\.yaml and {group}/mine\.yaml"):
        compose("train", [own, "experiment=quickstart", f"{group}=[{shipped},mine]"])


def test_a_task_of_a_folder_on_hydras_search_path_is_found(tmp_path: Path) -> None:
    own = folder(tmp_path, {"task/mine.yaml": "defaults: [diffusion]\n_target_: mine.Task\n"})
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        compose("train", [own, "experiment=quickstart"])
        assert load_option("task", "mine")["_target_"] == "mine.Task"
