"""The examples of docs/extend.md and docs/extend_sampling.md as a user runs them, from an installed wheel."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ldm.checkpoint import load_state

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?:python|yaml)\n((?:# @.*\n)?# (mine/\S+)\n.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PAGES = ("extend.md", "extend_sampling.md")
SOURCES = ("ldm", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
DOORS = {
    "networks", "losses", "tasks", "optimizers", "callbacks", "loggers", "samplers", "guidance", "metrics", "data",
    "configs/network", "configs/loss/auxiliary", "configs/conditioner", "configs/task", "configs/optimizer",
    "configs/callbacks", "configs/logger", "configs/sampler", "configs/guidance", "configs/metric", "configs/data",
    "configs/experiment",
}  # fmt: skip


def copy_sources(to: Path) -> Path:
    """What a wheel is built from, so that the build leaves nothing in the repository."""
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the repository as it is."""
    folder = copy_sources(tmp_path_factory.mktemp("sources"))
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder / "dist"), str(folder))
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--target", str(folder), str(wheel))
    return folder


def pip(command: str, *arguments: str) -> None:
    common = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([sys.executable, "-m", "pip", command, *common, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def blocks() -> dict[str, str]:
    """The files that docs/extend.md and docs/extend_sampling.md show, by the path in their first lines."""
    found = [block for page in PAGES for block in BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))]
    assert len({path for _, path in found}) == len(found)
    return {path: text for text, path in found}


@pytest.fixture(scope="module")
def folder(tiny_shapes: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the package `mine` as documented, two text encoders, the data, and captions for it."""
    folder = tmp_path_factory.mktemp("user")
    for path, text in blocks().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    shutil.copytree(tiny_clip, folder / "models" / "clip")
    save_t5(folder / "models" / "t5")
    shutil.copytree(tiny_shapes, folder / "data")
    from ldm.data.shards.index import index_shards

    manifest = index_shards(str(folder / "data" / "train"))
    captions = {manifest.key(i): f"new caption {i}" for i in range(len(manifest))}
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def save_t5(folder: Path) -> None:
    """A T5 with random weights and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=64, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(["a red circle above a blue square"] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    config = T5Config(vocab_size=len(fast), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)


def run(command: str, installed: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """An installed command in the user's folder, whose Python sees nothing of the repository."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(installed)}
    line = [sys.executable, str(installed / "bin" / command), "--config-dir", "mine/configs", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def trained(installed: Path, folder: Path) -> Path:
    """The run of the documented experiment."""
    done = run("ldm-train", installed, folder, "experiment=mine_tiny", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert f"ldm-sample --config-dir mine/configs checkpoint={folder / 'run'} " in done.stdout
    return folder / "run"


def lines(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- the wheel


def test_the_wheel_holds_the_configurations_as_they_are(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if name.endswith(".yaml")}
    checkout = {f"ldm/{path.relative_to(ROOT)}": path.read_bytes() for path in (ROOT / "configs").rglob("*.yaml")}
    assert packed == checkout


@pytest.mark.parametrize("missing", ["configs/train.yaml", "configs/metric", "configs/network"])
def test_a_wheel_without_configurations_is_not_built(missing: str, tmp_path: Path) -> None:
    copy_sources(tmp_path)
    path = tmp_path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = subprocess.run([sys.executable, "setup.py", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and path.name in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_installed_framework_is_not_the_repository(installed: Path, folder: Path) -> None:
    code = "import ldm; from ldm.config.compose import CONFIGS; print(ldm.__file__, CONFIGS)"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.stdout.split() == [str(installed / "ldm" / "__init__.py"), str(installed / "ldm" / "configs")]


# ------------------------------------------------------------------------------------------------- the doors


def test_every_door_has_an_example_of_at_most_thirty_lines() -> None:
    written = blocks()
    paths = {str(Path(path).with_suffix("").relative_to("mine")) for path in written}
    groups = {str(Path(path).parent) for path in paths}
    assert DOORS - paths - groups == set()
    for path, text in written.items():
        body = [line for line in text.splitlines()[1:] if line.strip() and not line.startswith(("import", "from"))]
        assert len(body) <= 30, f"{path}: {len(body)} lines"
        assert max(map(len, text.splitlines())) <= 120, path


def test_network_and_conditioner_are_the_users(trained: Path) -> None:
    model = yaml.safe_load((trained / "distill" / "model" / "config.yaml").read_text())["model"]
    network = model["denoiser"]["network"]
    assert (network["_target_"], network["context_dim"]) == ("mine.networks.DiT", 24)  # T5's width, CLIP's is 16
    assert model["conditioner"]["join"] == "sequence"


def test_the_auxiliary_loss_has_its_own_column_and_no_part_in_validation(trained: Path) -> None:
    logged = lines(trained / "base")
    train = [line for line in logged if "train/loss" in line]
    assert len(train) == 2 and all("train/dispersive" in line for line in train)
    assert [name for line in logged for name in line if name.startswith("val/")] == ["val/loss"]
    assert not any("train/dispersive" in line for line in lines(trained / "first_stage"))


def test_the_optimizers_groups_follow_the_rule(trained: Path) -> None:
    state = load_state(trained / "base" / "checkpoints" / "step_00000002")
    decayed, plain = state["optimizer_states"][0]["param_groups"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["params"] and plain["params"]


def test_the_callback_shows_the_data_sources_captions(trained: Path) -> None:
    for stage in ("first_stage", "base", "distill"):
        for step in (0, 1):
            captions = (trained / stage / "captions" / f"step_{step:08d}.txt").read_text().splitlines()
            assert len(captions) == 4 and all(caption.startswith("new caption ") for caption in captions)


def test_every_logger_has_the_numbers_and_the_pictures(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = trained / "base"
    with (stage / "csv" / "metrics.csv").open() as file:
        assert [float(row["train/dispersive"]) for row in csv.DictReader(file) if row["train/dispersive"]]
    events = EventAccumulator(str(stage / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/dispersive", "val/loss"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["images"]
    journal = (stage / "journal.md").read_text()
    assert "train/dispersive" in journal
    assert (stage / "images" / "step_00000002.png").exists() and "step_00000002.png" in journal


def test_the_task_trains_its_own_objective(trained: Path) -> None:
    stage = trained / "distill"
    assert [line["step"] for line in lines(stage) if "train/loss" in line] == [1, 2]
    config = yaml.safe_load((stage / "config.yaml").read_text())
    assert config["task"]["_target_"] == "mine.tasks.GuidanceDistillation"
    assert (stage / "model" / "model.json").exists()


def test_sampler_and_guidance_are_the_users(trained: Path, installed: Path, folder: Path) -> None:
    done = run("ldm-sample", installed, folder, "checkpoint=run", "prompt=a red circle", "sampler=multistep",
               "guidance=rising", "sheet.x=guidance.power=2.0,0.5", "steps=2", "guidance_scale=5",
               "out=pictures")  # fmt: skip
    assert done.returncode == 0, done.stderr
    pictures = {}
    for path in sorted((folder / "pictures" / "cells").iterdir()):
        with Image.open(path) as image:
            facts = json.loads(image.text["ldm"])  # type: ignore[attr-defined]
            pictures[facts["guidance"]["power"]] = image.tobytes()
        assert facts["sampler"]["_target_"] == "mine.samplers.Multistep"
        assert facts["guidance"]["_target_"] == "mine.guidance.Rising"
    assert pictures.keys() == {2.0, 0.5} and pictures[2.0] != pictures[0.5]


def test_the_metric_is_the_users(trained: Path, installed: Path, folder: Path) -> None:
    done = run("ldm-evaluate", installed, folder, "checkpoint=run", "metrics=[saturation]", "n=4", "steps=1",
               "guidance_scale=1", "feature_cache=null", "out=scores")  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "scores" / "results.json").read_text())
    assert {result["source"] for result in results} == {"pictures", "reconstructions", "samples"}
    for result in results:
        value = result["metrics"]["saturation"]
        assert 0 <= value["ci_low"] <= value["value"] <= value["ci_high"] <= 1
        assert result["protocol"]["metrics"]["saturation"] == "max - min of RGB, mean over pixels"


@pytest.mark.slow
def test_a_sweep_of_two_processes_a_job_finds_the_users_folder(installed: Path, folder: Path) -> None:
    done = run("ldm-train", installed, folder, "-m", "experiment=mine_tiny", "stages=[first_stage,base]",
               "optimizer.lr=1e-3,2e-3", "trainer.devices=2", "trainer.strategy=ddp", "hydra.sweep.dir=sweep")  # fmt: skip
    assert done.returncode == 0, done.stderr
    models = sorted(str(path.parents[1].relative_to(folder)) for path in (folder / "sweep").rglob("model.json"))
    jobs = [f"sweep/optimizer.lr={lr}" for lr in ("0.001", "0.002")]
    assert models == [f"{job}/{stage}" for job in jobs for stage in ("base", "first_stage")]
