"""Every shipped experiment composes, fits its constructors, has its size, and trains in miniature."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.checkpoint import load_tensors
from ldm.config.build import build, stages
from ldm.config.check import check
from ldm.config.compose import CONFIGS, compose
from ldm.config.stages import stage_config
from ldm.errors import UserError
from ldm.training import curriculum

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
SHARDS = ["data.train.shards=nowhere", "data.val.shards=nowhere"]


def composed(experiment: str, stage: str, *more: str) -> DictConfig:
    overrides = [f"experiment={experiment}", "run_folder=nowhere", *SHARDS, *more]
    if experiment == "sd1":
        overrides.append("first_stage_loss.perceptual.network.path=nowhere")
    cfg = stage_config(compose("train", overrides), stage, overrides)
    OmegaConf.resolve(cfg)
    return cfg


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def stages_of_experiments() -> Iterator[tuple[str, str]]:
    for experiment in EXPERIMENTS:
        for stage in ("first_stage", "base", "finetune"):
            yield experiment, stage


@pytest.mark.parametrize(("experiment", "stage"), stages_of_experiments())
def test_every_knob_is_a_constructor_argument(experiment: str, stage: str) -> None:
    cfg = composed(experiment, stage)
    check(cfg.tasks[cfg.task])
    check(cfg.data)
    check(cfg.trainer)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_networks_are_built_on_the_meta_device(experiment: str) -> None:
    cfg = composed(experiment, "base")
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
    assert (base.ema.decay, base.conditioner.dropout) == (0.9999, 0.1)
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


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("experiment=quickstrat", "did you mean quickstart"),
        ("optimiser.lr=1", "optimizer.lr"),
        ("network.model_chanels=3", "network.model_channels"),
        ("sampelr=ddim", "no such knob"),
        ("just_a_word", "expected name=value"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(override: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        compose("train", ["experiment=quickstart", override] if "experiment" not in override else [override])


def test_a_knob_added_by_force_is_checked_against_the_constructor() -> None:
    cfg = composed("quickstart", "base", "+network.droput=0.1")
    with pytest.raises(UserError, match=r"network.droput: .*UNet has no such knob; did you mean dropout"):
        check(cfg.network, "network")


def test_the_command_line_wins_over_the_curriculum() -> None:
    cfg = composed("quickstart", "finetune", "optimizer.lr=0.125", "curriculum.finetune.data.size=48")
    assert (cfg.optimizer.lr, cfg.data.size) == (0.125, 48)


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"no stage 'fine'.*finetune"):
        composed("quickstart", "fine")
