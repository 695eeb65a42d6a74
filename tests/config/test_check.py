"""Every knob is compared with what reads it, by name and by type, before anything is built; a wrong one is named."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from ldm.config.build import check_stage, stages
from ldm.config.check import build, check, locate
from ldm.config.compose import compose
from ldm.config.stages import stage_config
from ldm.errors import UserError
from tests.config.launch import overrides_for

STAGES = ["first_stage", "base", "finetune"]


def check_launch(shapes: Path, out: Path, *more: str) -> None:
    """Composes a launch and checks its stages, as train.py does before the first one starts."""
    overrides = overrides_for(shapes, out, f"tokenizer_path={out}/tokenizer", *more)
    stages(compose("train", overrides), overrides, out)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # constructors' arguments
        ("optimizer.lr=abc", r"optimizer\.lr='abc': expected a number"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas=\[0\.9\]: expected a list of 2"),
        ("optimizer.betas=[a,b]", r"optimizer\.betas=\['a', 'b'\]"),
        ("optimizer.foreach=maybe", r"optimizer\.foreach='maybe': expected true or false or null"),
        ("data.size=[32,a]", r"data\.size=\[32, 'a'\]: expected a whole number or a list of whole numbers"),
        ("data.global_batch=4.5", r"data\.global_batch=4\.5: expected a whole number"),
        ("data.train.flip=3", r"data\.train\.flip=3: expected true or false"),
        ("data.train.captions=txt", r"data\.train\.captions='txt': expected a mapping or null"),
        ("data.buckets=64", r"data\.buckets=64: "),
        ("callbacks.ema.decay=high", r"callbacks\.ema\.decay='high': expected a number"),
        ("callbacks.images.n=2.5", r"callbacks\.images\.n=2\.5: expected a whole number"),
        ("callbacks.images.prompts=red", r"callbacks\.images\.prompts='red': expected a list of texts or null"),
        ("sampling.steps=many", r"sampling\.steps='many': expected a whole number"),
        ("trainer.max_steps=abc", r"trainer\.max_steps='abc': expected a whole number"),
        ("network.channel_mult=3", r"network\.channel_mult=3: expected a list of whole numbers"),
        ("network.dropout=true", r"network\.dropout=True: expected a number"),
        ("statistics_images=1.5", r"statistics_images=1\.5: expected a whole number"),
        ("lr_schedule.num_warmup_steps=a", r"lr_schedule\.num_warmup_steps='a': expected a whole number"),
        # what the launch reads
        ("seed=abc", "seed='abc': expected a whole number"),
        ("compile=maybe", "compile='maybe': expected true or false"),
        ("curriculum.base.compile=maybe", "compile='maybe': expected true or false"),
        ("latents=5", "latents=5: expected a text or null"),
        ("latent_variants=two", "latent_variants='two': expected a whole number"),
        ("latent_text=maybe", "latent_text='maybe': expected true or false"),
        ("objective=5", "objective=5: expected a text or null"),
        ("resume=5", "resume=5: expected a text or null"),
        ("init_parts=network", "init_parts='network': expected a list of texts or null"),
        ("evaluation.metrics=fid", r"evaluation\.metrics='fid': expected a list of texts"),
        ("stages=base", "stages='base': expected a list of texts"),
        ("stages=[]", r"stages=\[\]: name one or more of \['first_stage', 'base', 'finetune'\]"),
        ("stages=[base,base]", r"stages=\['base', 'base'\]: .*each once"),
        ("stages=[bse]", "stages: there is no stage 'bse'; did you mean base"),
        # what would have no effect
        ("stage=base", "stage=base: it is set for each stage"),
        ("stage_folder=x", "stage_folder=x: it is set for each stage"),
        ("run_folder=elsewhere", r"run_folder=elsewhere: .*hydra\.run\.dir"),
        ("trainer.foo=1", r"trainer\.foo: "),
        ("callbacks.images.promts=[red]", r"callbacks\.images\.promts: .*did you mean prompts"),
        ("callbacks.emaa.decay=0.5", r"callbacks\.emaa=.*_target_.*callbacks\.emaa=null"),
        ("callbacks.mine=3", r"callbacks\.mine=3"),
        ("logger.csv.name=x", r"logger\.csv=.*_target_"),  # logger=csv was not given
    ],
)
def test_a_wrong_value_names_the_knob(override: str, message: str, tiny_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        check_launch(tiny_shapes, tmp_path, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["latent_variants=4", "latent_text=true"])
def test_knobs_of_cached_latents_are_refused_where_there_are_none(
    override: str, tiny_shapes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^latents=null: latent_variants and latent_text"):
        check_launch(tiny_shapes, tmp_path, "latents=null", override)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=1", "optimizer.betas=[0.5,1]", "data.size=[32,16]", "trainer.devices=auto",
        "trainer.max_time=1:0:0",
        "trainer.max_time={hours: 1}", "callbacks.ema=null", "callbacks.images.prompts=[red]", "logger=[csv,wandb]",
        "data.train.captions={txt: 1}", "trainer.limit_val_batches=0.5",
    ],
)  # fmt: skip
def test_what_fits_passes(override: str, tiny_shapes: Path, tmp_path: Path) -> None:
    check_launch(tiny_shapes, tmp_path, override)


def test_a_callback_of_the_experiment_that_is_not_chosen_is_named(tiny_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks\.images=null for none"):
        check_launch(tiny_shapes, tmp_path, "callbacks=[ema,checkpoints,throughput]")


def test_a_knob_that_an_interpolation_names_is_the_one_to_fix(tiny_shapes: Path, tmp_path: Path) -> None:
    overrides = overrides_for(tiny_shapes, tmp_path, "data.total_steps=${trainer.log_every_n_steps}")
    overrides.append("trainer.log_every_n_steps=often")
    config = stage_config(compose("train", overrides), "first_stage", overrides)
    with pytest.raises(UserError, match=r"^trainer\.log_every_n_steps='often'"):
        check_stage(config, STAGES)


def test_an_interpolation_on_the_command_line_takes_the_stages_values(tiny_shapes: Path, tmp_path: Path) -> None:
    overrides = overrides_for(
        tiny_shapes, tmp_path, "data.val_samples=${data.global_batch}", "seed=${trainer.max_steps}"
    )
    overrides += ["curriculum.base.data.global_batch=6", "curriculum.base.trainer.max_steps=7"]
    config = stage_config(compose("train", overrides), "base", overrides)
    assert (config.data.val_samples, config.seed, config.task.seed) == (6, 7, 7)


# -------------------------------------------------------------------------------------------- annotations of any kind


class Part:
    """A constructor with one argument of each kind."""

    def __init__(
        self,
        pair: tuple[int, float] = (1, 2.0),
        several: tuple[str, ...] = (),
        numbers: Sequence[float] = (),
        weights: Mapping[str, float] | None = None,
        mode: Literal["a", "b"] = "a",
        path: str | Path = "",
        part: "Part | None" = None,
        anything: Any = None,
        **options: Any,
    ) -> None:
        if mode == "b":
            raise ValueError("b is not ready\nreally")


@pytest.mark.parametrize(
    ("knob", "value", "fits"),
    [
        ("pair", [1, 2], True),
        ("pair", [1.5, 2], False),
        ("pair", [1, 2, 3], False),
        ("several", ["a", "b", "c"], True),
        ("several", ["a", 1], False),
        ("numbers", [1, 2.5], True),
        ("numbers", 1, False),
        ("weights", {"a": 1}, True),
        ("weights", {"a": "b"}, False),
        ("weights", None, True),
        ("mode", "a", True),
        ("mode", "c", False),
        ("path", "a/b", True),
        ("path", 3, False),
        ("part", None, True),
        ("part", {"_target_": f"{__name__}.Part"}, True),
        ("part", "part", False),
        ("anything", [True], True),
        ("options", None, True),
        ("more", 3, True),
    ],
)
def test_annotations(knob: str, value: Any, fits: bool) -> None:
    node = OmegaConf.create({"_target_": f"{__name__}.Part", knob: value})
    if fits:
        check(node, "part")
    else:
        with pytest.raises(UserError, match=rf"^part\.{knob}="):
            check(node, "part")


def test_a_constructor_that_fails_keeps_its_message_and_names_its_knob() -> None:
    node = OmegaConf.create({"_target_": f"{__name__}.Part", "part": {"_target_": f"{__name__}.Part", "mode": "b"}})
    with pytest.raises(UserError, match=rf"^outer\.part: {__name__}\.Part cannot be built: ValueError: b is not ready"):
        build(node, "outer")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ldm.training.ema.EMAA", "there is no EMAA; did you mean EMA"),
        ("ldm.traning.ema.EMA", "no such class or function|did you mean training"),
        ("nowhere.Thing", "no such class or function"),
        ("Thing", "no such class or function"),
    ],
)
def test_a_target_that_does_not_exist_is_named(target: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        locate(target)
    assert target in str(caught.value)
