"""What evaluate.py makes of its knobs: guidance scales, the model's own sampling settings, sets, whole numbers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from ldm.commands.evaluate import reference_sets, require_whole_numbers, sampling_of
from ldm.config.compose import compose
from ldm.errors import UserError

OWN = {
    "sampler": {"_target_": "ldm.sampling.ddpm.DDPM"},
    "grid": {"_target_": "ldm.sampling.grid.Trailing"},
    "guidance": {"_target_": "ldm.sampling.guidance.ClassifierFree"},
    "steps": 17,
    "guidance_scale": 2.5,
}


def cfg_of(*overrides: str) -> DictConfig:
    return compose("evaluate", ["checkpoint=x", "out=y", *overrides])


def sampling(*overrides: str) -> tuple[list[float], dict[str, Any]]:
    trained: Any = SimpleNamespace(config=OmegaConf.create({"sampling": OWN}))
    return sampling_of(cfg_of(*overrides), trained)


def test_what_is_not_given_is_the_models_own() -> None:
    scales, settings = sampling("guidance_scale=null")
    assert scales == [2.5] and settings == OWN
    scales, settings = sampling("sampler=ddim", "steps=5")
    assert scales == [1.5, 3.0, 5.0, 7.5]
    assert settings["sampler"]["_target_"] == "ldm.sampling.ddim.DDIM" and settings["steps"] == 5
    assert (settings["grid"], settings["guidance"]) == (OWN["grid"], OWN["guidance"])


def test_a_scale_is_measured_once() -> None:
    assert sampling("guidance_scale=[2,1,2.0]")[0] == [2.0, 1.0]
    assert sampling("guidance_scale=3")[0] == [3.0]


@pytest.mark.parametrize("given", ["[]", "strong", "[1,strong]", "true", "[[1,2]]"])
def test_other_scales_are_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"guidance_scale=.*expected a number or a list of numbers"):
        sampling(f"guidance_scale={given}")


@pytest.mark.parametrize("given", ["n=1", "n=2.5", "n=many", "seed=-1", "batch_size=0", "n=true"])
def test_counts_are_whole_numbers(given: str) -> None:
    require_whole_numbers(cfg_of(), {"n": 2, "seed": 0, "batch_size": 1})
    with pytest.raises(UserError, match=f"{given.split('=')[0]}=.*expected a whole number"):
        require_whole_numbers(cfg_of(given), {"n": 2, "seed": 0, "batch_size": 1})


def sets(own: dict[str, Any], data: Any = None, n: int = 8) -> dict[str, int]:
    config, cfg = OmegaConf.create({"evaluation": {"sets": own}}), cfg_of(f"n={n}")
    cfg.data = data
    return {one.name: one.n for one in reference_sets(config, cfg, (32, 32))}


def test_sets_are_the_models_own_or_shards(tiny_shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"validation": f"{tiny_shapes}/val", "held_out": f"{tiny_shapes}/held_out", "gone": None}
    assert sets(own) == {"validation": 8, "held_out": 8}
    assert capsys.readouterr().err == ""
    assert sets(own, "validation", n=99) == {"validation": 16}
    assert "validation: all of its 16 pictures are used (n=99)" in capsys.readouterr().err
    assert sets(own, f"{tiny_shapes}/val") == {"data": 8}
    assert sets(own, [f"{tiny_shapes}/val", f"{tiny_shapes}/train"], n=80) == {"data": 80}


def test_a_set_that_is_not_there_is_named_with_the_others(tiny_shapes: Path) -> None:
    own = {"validation": f"{tiny_shapes}/val", "held_out": "/nowhere"}
    for data in (None, "held_out"):
        with pytest.raises(UserError, match=r"held_out: .*/nowhere.*data= takes .*sets: validation, held_out"):
            sets(own, data)
    assert sets(own, "validation") == {"validation": 8}
    with pytest.raises(UserError, match=r"data=validatoin: .*sets: validation, held_out"):
        sets(own, "validatoin")
    with pytest.raises(UserError, match=r"data: not given; .*it has none"):
        sets({})
