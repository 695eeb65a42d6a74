"""Each command's smallest real use, as a user types it, and each kind of wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm.config.compose
from ldm.checkpoint import fingerprint
from ldm.evaluation.protocol import digest
from ldm.interop.model_folder import find_model_folder

ROOT = Path(__file__).parents[2]
TINY = ["experiment=quickstart", "variant=tiny"]


def run(script: str, *arguments: str, code: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """A command line; `code` is a folder with packages of the user's own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{code}"}
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def shards(folder: Path) -> list[str]:
    return [
        f"data.train.shards={folder}/train",
        f"data.val.shards={folder}/val",
        f"evaluation.sets.validation={folder}/val",
        f"evaluation.sets.held_out={folder}/held_out",
    ]


@pytest.fixture(scope="module")
def trained(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the command line."""
    out = tmp_path_factory.mktemp("commands") / "run"
    done = run("train.py", *TINY, *shards(tiny_shapes), f"hydra.run.dir={out}")
    assert done.returncode == 0, done.stderr
    return out


def pixels(path: Path) -> "np.ndarray[tuple[int, ...], np.dtype[np.int16]]":
    return np.asarray(Image.open(path)).astype(np.int16)


def test_images_are_the_same_in_any_batch(trained: Path, tmp_path: Path) -> None:
    common = [f"checkpoint={trained}", "prompt=a large red circle at the upper left", "steps=3"]
    few = run("sample.py", *common, "n=4", "seed=3", f"out={tmp_path / 'few'}")
    assert few.stdout.splitlines()[-2:] == [
        f"{tmp_path}/few/00000_seed6.png",
        f"4 images and grid.png written to {tmp_path}/few/",
    ]
    assert "step/s" in few.stderr and "step/s" not in few.stdout
    many = run("sample.py", *common, "n=8", "seed=0", f"out={tmp_path / 'many'}", "batch_size=5")
    assert (few.returncode, many.returncode) == (0, 0), few.stderr + many.stderr
    for seed in range(3, 7):
        one, other = (pixels(tmp_path / folder / f"00000_seed{seed}.png") for folder in ("few", "many"))
        assert np.abs(one - other).max() <= 1
    facts = json.loads(Image.open(tmp_path / "few" / "00000_seed3.png").text["ldm"])  # type: ignore[attr-defined]
    assert (facts["seed"], facts["steps"]) == (3, 3)
    assert (tmp_path / "few" / ".hydra" / "config.yaml").exists()
    versions = json.loads((tmp_path / "few" / "versions.json").read_text())
    assert versions["torch"] and facts["versions"] == versions


def test_a_contact_sheet_on_two_devices_and_one_of_its_pictures_again(trained: Path, tmp_path: Path) -> None:
    how = [f"checkpoint={trained}", "prompt=a large red circle, at the upper left (really)", "grid=trailing", "n=2",
           "sheet.x=guidance_scale=1,3", "sheet.y=sampler=ddim,dpmpp_2m", "steps=3", "batch_size=2"]  # fmt: skip
    one = run("sample.py", *how, f"out={tmp_path / 'one'}")
    two = run("sample.py", *how, f"out={tmp_path / 'two'}", "devices=2")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    pictures = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(pictures) == 2 * 2 * 2 + 1  # cells of two, and the sheet
    for path in pictures:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    again = run("sample.py", f"from={tmp_path / 'two' / pictures[3]}", f"out={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    difference = pixels(tmp_path / "again" / "00000_seed1.png") - pixels(tmp_path / "one" / pictures[3])
    assert np.abs(difference).max() <= 1  # it stood in another batch
    other = run("sample.py", f"from={tmp_path / 'one' / pictures[0]}", f"checkpoint={trained}/base", f"out={tmp_path}")
    assert other.returncode == 1 and "trained again or replaced" in other.stderr


def test_a_picture_is_painted_where_the_mask_is_white(trained: Path, tmp_path: Path) -> None:
    given, mask = np.full((32, 32, 3), 90, np.uint8), np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(given).save(tmp_path / "given.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "seed": 4}\n{"prompt": "b", "strength": 1, "steps": 2}\n')
    files = [f"init_image={tmp_path}/given.png", f"mask={tmp_path}/mask.png", f"prompts={tmp_path}/prompts.jsonl"]
    done = run("sample.py", f"checkpoint={trained}", *files, "grid=trailing", "steps=4", "n=1", f"out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert "16x16 is resized to the picture's 32x32" in done.stdout + done.stderr
    for name in ("00000_seed4.png", "00001_seed0.png"):
        made = pixels(tmp_path / "out" / name)
        assert (made[:, :12] == 90).all() and (made[:, 20:] != 90).any()


def test_evaluation_writes_one_table_one_plot_and_results_with_provenance(trained: Path, tmp_path: Path) -> None:
    done = run("evaluate.py", f"checkpoint={trained}", "guidance_scale=[1,2]", "n=6", "steps=2", f"out={tmp_path}",
               "metrics=[alignment]")  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(r["set"], r["source"]) for r in results[:4]] == [
        ("validation", "pictures"),
        ("validation", "reconstructions"),
        ("validation", "samples"),
        ("validation", "samples"),
    ]
    assert len(results) == 8
    assert results[0]["metrics"]["all"]["value"] == 1.0
    assert all(len(result["provenance"]) == 64 for result in results)
    assert "guidance 2" in (tmp_path / "table.md").read_text()
    for name in ("guidance.png", "curves.png", "reconstructions_validation.png", "samples_held_out_g2.png"):
        assert Image.open(tmp_path / name).size[0] > 100


def test_without_weights_the_other_metrics_are_measured(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    how = ["data=validation", "guidance_scale=2", "n=6", "steps=2", "seed=5", f"feature_cache={tmp_path}/features"]
    metrics = "metrics=[fid,kernel,frechet,alignment]"
    done = run("evaluate.py", f"checkpoint={trained}", f"out={tmp_path}", metrics, *how)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for told in ("error: fid was not measured", "pt_inception-2015-12-05-6726825d.pth", str(tmp_path / "torch")):
        assert told in done.stderr
    *_, samples = json.loads((tmp_path / "results.json").read_text())
    assert {"all", "Kernel(efficientnet-lite0)", "Frechet(efficientnet-lite0)"} <= samples["metrics"].keys()
    for value in samples["metrics"].values():
        assert value["ci_low"] <= value["value"] <= value["ci_high"]
    assert "Kernel(efficientnet-lite0)" in (tmp_path / "table.md").read_text()
    assert len(list((tmp_path / "features").iterdir())) == 1

    protocol = samples["protocol"]
    assert not [name for name, value in protocol.items() if value in (None, {}, [])]
    told = (protocol["n_images"], protocol["seed"], protocol["steps"], protocol["guidance_scale"], protocol["ema"])
    assert told == (6, 5, 2, 2.0, True)
    assert "DPMPP2M" in protocol["sampler"] and "ClassifierFree" in protocol["guidance"]
    assert "bicubic antialias to 128" in protocol["metrics"]["Kernel(efficientnet-lite0)"]
    assert "32x32" in protocol["reference"] and len(protocol["prompts"]) == 64 and len(protocol["weights"]) == 16
    assert {"python", "torch", "ldm", "transformers"} <= protocol["versions"].keys()
    folder = find_model_folder(trained, "diffusion")  # the weights of the record are the averages that were evaluated
    assert protocol["weights"] == fingerprint(folder.weights("ema")) != folder.record["fingerprint"]
    content = {name: samples[name] for name in ("format", "protocol", "metrics")}
    assert samples["provenance"] == digest(content)


@pytest.mark.skipif(not hasattr(ldm.config.compose, "load_option"), reason="groups are looked up in configs/ alone")
def test_a_metric_of_ones_own_is_a_class_and_a_file(trained: Path, tmp_path: Path) -> None:
    blocks = (ROOT / "docs" / "evaluate.md").read_text().split("```")
    code = next(block for block in blocks if block.startswith("python\n# mine.py")).removeprefix("python\n")
    node = next(block for block in blocks if "_target_: mine.Brightness" in block).removeprefix("yaml\n")
    (tmp_path / "configs" / "metric").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "configs" / "metric" / "brightness.yaml").write_text(node)
    done = run("evaluate.py", "--config-dir", str(tmp_path / "configs"), f"checkpoint={trained}", "guidance_scale=1",
               "n=4", "steps=2", "metrics=[brightness]", f"out={tmp_path}/out", code=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(0 < row["metrics"]["brightness"]["value"] < 1 for row in rows)
    assert "%" in (tmp_path / "out" / "table.md").read_text()


def test_a_finished_run_is_not_trained_again(trained: Path, tiny_shapes: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("model.json")}
    done = run("train.py", *TINY, *shards(tiny_shapes), f"resume={trained}")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("model.json")} == before


def test_two_processes_share_one_run_folder(tiny_shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "ddp"
    done = run("train.py", *TINY, *shards(tiny_shapes), "stages=[first_stage]", "trainer.devices=2",
               "trainer.strategy=ddp", f"hydra.run.dir={out}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (out / "first_stage" / "model" / "model.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["ddp"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["experiment=quickstrat"], "did you mean quickstart"),
        ("train.py", ["experiment=quickstart", "optimizer.lrr=1"], "did you mean optimizer.lr"),
        ("train.py", ["experiment=quickstart", "data.train.shards=/nowhere"], "/nowhere"),
        ("train.py", ["experiment=quickstart", "trainer.devices=4096"], "this machine has"),
        ("train.py", ["experiment=quickstart", "resume=/nowhere"], "nothing is there"),
        ("sample.py", ["checkpoint=/nowhere", "prompt=x"], "nothing is there"),
        ("sample.py", ["prompt=x"], "checkpoint: not given"),
        ("sample.py", ["checkpoint=/nowhere", "prompt=x", "guidance_scal=2"], "did you mean guidance_scale"),
        ("evaluate.py", ["checkpoint=/nowhere"], "nothing is there"),
        ("evaluate.py", ["checkpoint=/nowhere", "n=1"], "n=1: expected a whole number, 2 or more"),
    ],
)
def test_wrong_input_is_one_message_and_exit_status_1(
    script: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    where = f"hydra.run.dir={tmp_path}" if script == "train.py" else f"out={tmp_path}"
    done = run(script, *arguments, where)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_trained_model_cannot_do_is_refused(trained: Path, tmp_path: Path) -> None:
    common = [f"checkpoint={trained}", "prompt=a small blue star in the centre", "steps=2", f"out={tmp_path}"]
    for given, message in (
        (["size=[30,30]"], "factor 4"),
        (["steps=0"], "steps=0"),
        (["prompt=null"], "this model reads a text (caption)"),
        (["sheet.x=guidance_scal=1,2"], "did you mean guidance_scale"),
        ([f"checkpoint={trained}/first_stage"], "first_stage"),
    ):
        done = run("sample.py", *common, *given)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert message in done.stderr


def test_a_prompt_over_the_models_length_is_cut_and_told(trained: Path, tmp_path: Path) -> None:
    prompt = "prompt=" + "large red circle " * 40
    done = run("sample.py", f"checkpoint={trained}", prompt, "steps=1", "n=1", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "truncated to" in done.stderr + done.stdout
