"""Nothing that is accepted is without effect: every knob of every shipped composition reaches what is built.

Each leaf of a composed configuration is replaced by a token of its own, and the token is looked for in the nodes of
the stages that constructors are called with. What the launch itself reads is listed, with the test that shows it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.config.check import build
from ldm.config.compose import CONFIGS, compose
from ldm.config.stages import stage_config
from ldm.errors import UserError

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
ROOT = Path(__file__).parents[2]
BUILT = ("task", "data", "trainer", "callbacks", "logger", "sampling")
"""What `ldm.config.build` makes objects of, and (sampling) writes into the model folder."""
LAUNCH = {  # read by the launch itself, or refused where it sets them: the test that shows it
    "name": "tests/config/test_build.py::test_name_and_seed_are_the_runs",
    "resume": "tests/config/test_run_folder.py::test_a_runs_folder",
    "objective": "tests/end_to_end/test_launches.py::test_optuna_is_given_the_objective",
    "stages": "tests/config/test_build.py::test_the_stages_that_are_named_run_in_that_order",
    "stage": "tests/config/test_check.py::test_a_wrong_value_names_the_knob",
    "stage_folder": "tests/config/test_check.py::test_a_wrong_value_names_the_knob",
    "run_folder": "tests/config/test_check.py::test_a_wrong_value_names_the_knob",
    "tokenizer_path": "tests/config/test_init_parts.py::test_a_text_encoder_of_another_vocabulary_is_refused",
    "compile": "tests/config/test_build.py::test_compile_compiles_what_is_trained",
    "latents": "tests/training/test_latents.py::test_the_loss_is_that_of_the_pictures",
    "latent_variants": "tests/training/test_latents.py::test_variants_are_as_many_crops_of_each_picture",
    "latent_text": "tests/training/test_latents.py::test_states_of_a_frozen_text_encoder_are_cached",
    "first_stage_from": "tests/config/test_sources.py::test_a_first_stage_comes_from_any_format",
    "init_from": "tests/config/test_sources.py::test_training_begins_with_weights_of_any_format",
    "init_parts": "tests/config/test_init_parts.py::test_parts_are_chosen",
    "evaluation": "tests/end_to_end/test_commands.py::"
    "test_evaluation_writes_one_table_one_plot_and_results_with_provenance",
}


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[DictConfig | ListConfig, Any, str]]:
    """(parent, key, dotted name) of everything that is no mapping; a list of plain values is one leaf."""
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        child, name = node._get_node(key), f"{prefix}{key}"
        nested = OmegaConf.is_config(child) and not child._is_none() and not child._is_interpolation()
        mappings = (
            isinstance(child, ListConfig)
            and nested
            and any(OmegaConf.is_config(child._get_node(i)) for i in range(len(child)))
        )
        if nested and ((isinstance(child, DictConfig) and len(child)) or mappings):
            yield from leaves(child, f"{name}.")
        else:
            yield node, key, name


def with_tokens(cfg: DictConfig, interpolations: bool = False) -> dict[str, str]:
    """Replaces every leaf but targets by a token (the interpolations, or all other values); the tokens by name."""
    tokens = {}
    for parent, key, name in list(leaves(cfg)):
        if str(key).startswith("_") or name.split(".")[0] in ("hydra", *LAUNCH, "curriculum"):
            continue
        if OmegaConf.is_interpolation(parent, key) is not interpolations:
            continue  # an interpolation takes another knob's value, which has a token of its own
        tokens[name] = f"token-{len(tokens)}-"
        parent[key] = tokens[name]
    return tokens


def dead_knobs(cfg: DictConfig, interpolations: bool = False) -> list[str]:
    """The knobs whose tokens no constructor gets, in the first stage or in the second."""
    OmegaConf.set_struct(cfg, False)
    tokens = with_tokens(cfg, interpolations)
    assert len(tokens) > (20 if interpolations else 60)
    text = "".join(reached(stage_config(cfg, stage, [])) for stage in ("first_stage", "base"))
    overridden = {name for stage in cfg.curriculum for _, _, name in leaves(cfg.curriculum[stage])}
    return [name for name, token in tokens.items() if token not in text and name not in overridden]


def reached(config: DictConfig) -> str:
    """All that a stage's constructors are called with, as one text."""
    return repr({name: OmegaConf.to_container(config[name], resolve=True) for name in BUILT if name in config})


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("more", [(), ("variant=tiny", "logger=[csv,tensorboard,wandb]")], ids=["whole", "tiny"])
def test_every_knob_reaches_a_constructor(experiment: str, more: tuple[str, ...]) -> None:
    overrides = [f"experiment={experiment}", "run_folder=run", "data.train.shards=t", "data.val.shards=v", *more]
    if experiment == "sd1" and "variant=tiny" not in more:
        overrides.append("first_stage_loss.perceptual.network.path=p")
    for interpolations in (False, True):
        dead = dead_knobs(compose("train", overrides), interpolations)
        assert not dead, f"accepted without effect: {dead}"


@pytest.mark.parametrize("interpolations", [False, True])
def test_every_knob_of_the_defaults_reaches_a_constructor(interpolations: bool) -> None:
    overrides = ["name=mine", "run_folder=run", "data.train.shards=t", "data.val.shards=v"]
    overrides += [f"curriculum.{stage}.trainer.max_steps=1" for stage in ("first_stage", "base")]
    assert dead_knobs(compose("train", [*overrides, "trainer.max_steps=1"]), interpolations) == []


@pytest.mark.parametrize("value", [1, "${seed}"])
def test_a_dead_knob_is_found(value: Any) -> None:
    cfg = compose("train", ["experiment=quickstart", "run_folder=run"])
    OmegaConf.update(cfg, "dead", {"knob": value}, force_add=True)
    assert dead_knobs(cfg, isinstance(value, str)) == ["dead.knob"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_knob_of_a_stage_reaches_a_constructor(experiment: str) -> None:
    cfg = compose("train", [f"experiment={experiment}", "run_folder=run", "data.train.shards=t", "data.val.shards=v"]
                  + ["first_stage_loss.perceptual.network.path=p"] * (experiment == "sd1"))  # fmt: skip
    OmegaConf.set_struct(cfg, False)
    for stage in cfg.curriculum:
        difference = cfg.curriculum[stage]
        tokens = {}
        for parent, key, name in list(leaves(difference)):
            if name.split(".")[0] not in LAUNCH and name not in ("task", "callbacks.ema"):
                tokens[name] = f"token-{stage}-{len(tokens)}-"
                parent[key] = tokens[name]
        text = reached(stage_config(cfg, str(stage), []))
        dead = [name for name, token in tokens.items() if token not in text]
        assert not dead, f"curriculum.{stage}: accepted without effect: {dead}"


@pytest.mark.parametrize("knob", LAUNCH)
def test_what_the_launch_reads_is_in_the_configuration_and_tested(knob: str) -> None:
    assert knob in set(map(str, OmegaConf.load(CONFIGS / "train.yaml")))
    file, _, name = LAUNCH[knob].partition("::")
    tree = ast.parse((ROOT / file).read_text())
    (test,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    helpers = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("test_")]
    assert any(knob in ast.unparse(node) for node in (test, *helpers)), f"{LAUNCH[knob]} does not mention {knob}"


def test_a_knob_that_no_constructor_has_is_not_built() -> None:
    node = OmegaConf.create({"_target_": "ldm.training.ema.EMA", "decay": 0.9, "decai": 0.5})
    with pytest.raises(UserError, match=r"ema\.decai: .*no such knob; did you mean decay"):
        build(node, "ema")
