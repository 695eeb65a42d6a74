"""A second stage that trains from cached latents sees what it would see of the pictures, and nothing is made twice."""

from pathlib import Path

import pytest
import torch

from ldm.commands.cache_latents import main
from ldm.data.loading.latents import LatentSource, read_record
from ldm.errors import UserError
from ldm.training.curriculum import Job
from ldm.training.diffusion import DiffusionModule
from tests.training.miniature import launch, train


def job(shapes: Path, run: Path, *more: str) -> Job:
    """The stage `base`, built."""
    (stage,), finished = launch(shapes, run, "stages=[base]", *more)
    return stage.build(finished)


@pytest.fixture(scope="module")
def run(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_shapes, tmp_path_factory.mktemp("run"), "stages=[first_stage]")


def test_the_loss_is_that_of_the_pictures(tiny_shapes: Path, run: Path, tmp_path: Path) -> None:
    losses = []
    for more in ("latents=null", f"latents={tmp_path}"):
        made = job(tiny_shapes, run, more)
        made.datamodule.setup()
        assert isinstance(made.module, DiffusionModule)
        made.module.eval()
        with torch.no_grad():
            batches = made.datamodule.train_batches()
            losses.append([float(made.module.denoising_loss(batches[i], True).loss) for i in range(2)])
            assert (batches[0].moments is not None) == (more != "latents=null")
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[0][0] != losses[0][1]


def test_variants_are_as_many_crops_of_each_picture(tiny_shapes: Path, run: Path, tmp_path: Path) -> None:
    """A visit takes one of them, so visits of other epochs see other latents."""
    more = ["data.train.random_crop=true", "latent_variants=3", f"latents={tmp_path}/l"]
    source = job(tiny_shapes, run, *more).datamodule.sources["train"]
    assert isinstance(source, LatentSource) and read_record(source.folder).variants == 3
    with pytest.raises(UserError, match=r"^latent_variants=3 .*data\.train\.random_crop=true"):
        job(tiny_shapes, run, "latent_variants=3", f"latents={tmp_path}/m")


def test_states_of_a_frozen_text_encoder_are_cached(tiny_shapes: Path, run: Path, tmp_path: Path) -> None:
    held = []
    for value in ("true", "false"):
        made = job(tiny_shapes, run, "conditioner.frozen=true", f"latent_text={value}", f"latents={tmp_path}/{value}")
        made.datamodule.setup()
        fields = made.datamodule.train_batches()[0].fields
        held.append([name for name in fields if torch.is_tensor(fields[name])])
    assert held[0] and not held[1]
    with pytest.raises(UserError, match=r"latent_text=true: .*no frozen text encoder"):
        job(tiny_shapes, run, "conditioner.frozen=false", "latent_text=true", f"latents={tmp_path}/trained")


def test_the_command_makes_what_the_launch_looks_for(
    tiny_shapes: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [f"data.{name}.shards={tiny_shapes}/{name}" for name in ("train", "val")]
    first_stage = f"first_stage_from={run}/first_stage"
    launched = ["experiment=quickstart", "variant=tiny", *shards, "stages=[base]", first_stage, f"latents={tmp_path}/l"]
    assert main([*launched, "devices=2"]) == 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert len({path.parent for path in written}) == 2  # train and val
    made = job(tiny_shapes, run, f"latents={tmp_path}/l")
    assert Path(str(made.datamodule.sources["train"].shards)).is_relative_to(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == written


def test_what_the_command_lacks_is_told(tiny_shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["experiment=quickstart", f"data.train.shards={tiny_shapes}/train"]
    assert main([*overrides, "stages=[first_stage]", "latents=auto"]) == 1
    assert "none of them trains on latents" in capsys.readouterr().err
    assert main([*overrides, "stages=[base]", "latents=null"]) == 1
    assert "latents: not given" in capsys.readouterr().err
    assert main([*overrides, "stages=[base]"]) == 1
    assert "keeps them in the run's folder; give run_folder" in capsys.readouterr().err


def test_a_first_stage_does_not_train_from_latents(tiny_shapes: Path, run: Path, tmp_path: Path) -> None:
    latents = job(tiny_shapes, run, f"latents={tmp_path}/l").datamodule.sources["train"]
    (stage,), finished = launch(
        tiny_shapes, tmp_path, "stages=[first_stage]", "data.size=16", "curriculum.first_stage.data.size=16"
    )
    made = stage.build(finished)
    made.datamodule.sources["train"] = latents
    with pytest.raises(UserError, match="on pictures"):
        made.trainer.fit(made.module, datamodule=made.datamodule)
