"""Arguments that a constructor takes and the YAML does not list need no plus on the command line."""

import pytest

from ldm.config.compose import completed, compose, first_of_sweeps
from ldm.config.stages import stage_config
from ldm.errors import UserError

TINY = ["experiment=quickstart", "variant=tiny"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("optimizer.eps=1e-6", "++optimizer.eps=1e-6"),
        ("optimizer.eps=1e-6,1e-7", "++optimizer.eps=1e-6,1e-7"),
        ("trainer.max_time=00:08:00:00", "++trainer.max_time=00:08:00:00"),
        ("curriculum.base.optimizer.eps=1e-6", "++curriculum.base.optimizer.eps=1e-6"),
        ("curriculum.base.ema.decay=0.5", "++curriculum.base.ema.decay=0.5"),
        ("optimizer.lr=1", "optimizer.lr=1"),
        ("optimizer.lrr=1", "optimizer.lrr=1"),
        ("+optimizer.eps=1", "+optimizer.eps=1"),
        ("~optimizer.lr", "~optimizer.lr"),
        ("sampler@samples.sampler=ddim", "sampler@samples.sampler=ddim"),
        ("curriculum.bas.ema.decay=0.5", "curriculum.bas.ema.decay=0.5"),
    ],
)
def test_only_what_a_constructor_takes_gets_one(given: str, expected: str) -> None:
    assert completed("train", [*TINY, given]) == [*TINY, expected]


def test_the_value_arrives() -> None:
    overrides = [*TINY, "optimizer.eps=1e-3", "curriculum.base.ema.decay=0.5", "run_folder=nowhere"]
    cfg = compose("train", overrides)
    assert cfg.optimizer.eps == 1e-3
    assert stage_config(cfg, "base", overrides).ema.decay == 0.5
    assert stage_config(cfg, "finetune", overrides).ema.decay == 0.995


def test_a_typing_error_still_gets_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r"optimizer\.lrr: there is no such knob; did you mean optimizer\.lr"):
        compose("train", [*TINY, "optimizer.lrr=1", "optimizer.eps=1e-6"])


@pytest.mark.parametrize(
    ("sweep", "first"),
    [
        ("optimizer.lr=1e-4,2e-4", "optimizer.lr=0.0001"),
        ("optimizer.lr=range(1,5)", "optimizer.lr=1"),
        ("optimizer.lr=tag(log,interval(0.25,1e-3))", "optimizer.lr=0.25"),
        ("prediction=glob(e*s*)", "prediction=epsilon"),
    ],
)
def test_every_kind_of_sweep_has_a_first_value(sweep: str, first: str) -> None:
    assert first_of_sweeps([sweep]) == [first]
    compose("train", [*TINY, "run_folder=nowhere", first])


def test_a_glob_that_nothing_matches_is_told() -> None:
    with pytest.raises(UserError, match="no prediction"):
        first_of_sweeps(["prediction=glob(z*)"])
