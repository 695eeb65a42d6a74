"""Every shipped experiment composes, fits its constructors, has its size, and trains in miniature."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from ldm.checkpoint import load_tensors
from ldm.config.build import check_stage, stages
from ldm.config.check import build
from ldm.config.compose import CONFIGS, compose
from ldm.config.infer import fill_widths
from ldm.config.stages import stage_config
from ldm.errors import UserError
from ldm.training import curriculum

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
STAGES = ["first_stage", "base", "finetune"]
SHARDS = ["data.train.shards=nowhere", "data.val.shards=nowhere"]


def composed(experiment: str, stage: str, *more: str) -> DictConfig:
    """The configuration of a stage, with its interpolations."""
    overrides = [f"experiment={experiment}", "run_folder=nowhere", *SHARDS, *more]
    if experiment == "sd1":
        overrides.append("first_stage_loss.perceptual.network.path=nowhere")
    return stage_config(compose("train", overrides), stage, overrides)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def stages_of_experiments() -> Iterator[tuple[str, str]]:
    for experiment in EXPERIMENTS:
        for stage in STAGES:
            yield experiment, stage


@pytest.fixture
def captions(tiny_shapes: Path, tmp_path: Path) -> list[str]:
    """Where the captions are that a text encoder's tokenizer is made of, and where it goes."""
    return [f"data.train.shards={tiny_shapes}/train", f"tokenizer_path={tmp_path}/tokenizer"]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("experiment", "stage"), stages_of_experiments())
def test_every_knob_is_a_constructor_argument(experiment: str, stage: str, captions: list[str]) -> None:
    cfg = composed(experiment, stage, *captions, "logger=[csv,tensorboard,wandb]", "trainer.devices=1")
    check_stage(cfg, STAGES)
    assert {"ema", "checkpoints", "images", "throughput", "progress"} == set(cfg.callbacks)
    assert {"csv", "tensorboard", "wandb"} == set(cfg.logger)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_networks_are_built_on_the_meta_device(experiment: str, captions: list[str]) -> None:
    cfg = composed(experiment, "base", *captions)
    fill_widths(cfg)
    with torch.device("meta"):
        unet, first_stage = build(cfg.network), build(cfg.first_stage)
    assert all(p.is_meta for p in [*unet.parameters(), *first_stage.parameters()])


def test_sd1s_text_encoder_is_clip_vit_l() -> None:
    cfg = composed("sd1", "base")
    assert cfg.conditioner.encoder.name_or_path == "openai/clip-vit-large-patch14"
    with torch.device("meta"):
        from ldm.conditioning.text import clip_text_from_config

        assert parameters(clip_text_from_config()) == 123_060_480


def test_sd1_has_the_published_hyperparameters() -> None:
    base, finetune = composed("sd1", "base"), composed("sd1", "finetune")
    assert (base.data.global_batch, base.optimizer.lr, base.lr_schedule.num_warmup_steps) == (2048, 1e-4, 10000)
    assert (base.callbacks.ema.decay, base.conditioner.dropout) == (0.9999, 0.1)
    assert (base.data.size, base.trainer.max_steps) == (256, 237_000)
    assert (finetune.data.size, finetune.trainer.max_steps) == (512, 194_000)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_tiny_variant_trains_every_stage_two_steps(experiment: str, tiny_shapes: Path, tmp_path: Path) -> None:
    overrides = [
        f"experiment={experiment}",
        "variant=tiny",
        f"data.train.shards={tiny_shapes}/train",
        f"data.val.shards={tiny_shapes}/val",
        f"run_folder={tmp_path}",
        "callbacks.progress=null",
        "compile=false",
    ]
    curriculum.run(*stages(compose("train", overrides), overrides, tmp_path))
    first, _ = load_tensors(tmp_path / "base" / "model" / "weights.safetensors")
    last, _ = load_tensors(tmp_path / "finetune" / "model" / "weights.safetensors")
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert any(name.startswith("denoiser") for name in moved)
    assert not any(name.startswith("first_stage") for name in moved)


@pytest.mark.parametrize("override", ["optimizer.lr=0.125", "optimizer={lr: 0.125}"])
def test_the_command_line_wins_over_the_curriculum(override: str) -> None:
    cfg = composed("quickstart", "finetune", override, "curriculum.finetune.data.size=48")
    assert (cfg.optimizer.lr, cfg.data.size) == (0.125, 48)
    assert cfg.optimizer._target_ == "torch.optim.AdamW"


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"no stage 'fine'.*finetune"):
        composed("quickstart", "fine")
