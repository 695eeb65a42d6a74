"""Composition: what may be given, what is refused with the nearest names, and what a config folder may bring."""

from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ldm.config.check import check
from ldm.config.compose import CONFIGS, compose, load_option, options, register_resolvers
from ldm.config.overrides import parse, with_texts
from ldm.config.stages import stage_config
from ldm.errors import UserError

TINY = ["experiment=quickstart", "variant=tiny", "run_folder=nowhere"]
DIT = "tests.networks.toy.ToyNetwork"


def configs(folder: Path, **files: str) -> str:
    """Writes config files, `group__name="..."`; the override that adds their folder to the search path."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return f"hydra.searchpath=[file://{folder}]"


def value(cfg: DictConfig, name: str) -> Any:
    return OmegaConf.select(cfg, name)


# ----------------------------------------------------------------------------------------------- what may be given


@pytest.mark.parametrize(
    ("override", "name", "expected"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer.eps=1e-3", "optimizer.eps", 1e-3),
        ("+optimizer.eps=1e-3", "optimizer.eps", 1e-3),
        ("++optimizer.eps=1e-3", "optimizer.eps", 1e-3),
        ("~optimizer.weight_decay", "optimizer.weight_decay", None),
        ("trainer.max_time=00:08:00:00", "trainer.max_time", "00:08:00:00"),
        ("callbacks.progress.every_s=5", "callbacks.progress.every_s", 5),
        ("callbacks.ema=null", "callbacks.ema", None),
        ("network.channel_mult.1=3", "network.channel_mult", [1, 3]),
        ("first_stage_loss.discriminator._target_=torch.nn.Identity", "first_stage_loss.discriminator",
         {"_target_": "torch.nn.Identity"}),
    ],
)  # fmt: skip
def test_what_the_yaml_or_the_constructor_has_needs_no_plus(override: str, name: str, expected: Any) -> None:
    found = value(compose("train", [*TINY, override]), name)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == expected


def test_a_stage_alone_may_be_changed() -> None:
    overrides = [*TINY, "curriculum.base.callbacks.ema.decay=0.5", "curriculum.base.optimizer.eps=1e-3"]
    cfg = compose("train", [*overrides, "curriculum.base.callbacks.mine={_target_: torch.nn.Identity}"])
    base, finetune = stage_config(cfg, "base", overrides), stage_config(cfg, "finetune", overrides)
    assert (base.callbacks.ema.decay, base.optimizer.eps) == (0.5, 1e-3)
    assert base.callbacks.mine == {"_target_": "torch.nn.Identity"}
    assert (finetune.callbacks.ema.decay, "eps" in finetune.optimizer, "mine" in finetune.callbacks) == (
        0.995,
        False,
        False,
    )


def test_a_knob_inside_a_list_may_be_changed() -> None:
    cfg = compose("train", [*TINY, "conditioner=sdxl", "conditioner.conditioners.1.max_length=12"])
    assert [part.get("max_length") for part in cfg.conditioner.conditioners][:2] == [77, 12]


@pytest.mark.parametrize(
    ("command", "override"),
    [
        ("train", "callbacks.mine._target_=torch.nn.Identity"),
        ("train", "logger.mine={_target_: torch.nn.Identity}"),
        ("train", "loss.auxiliary.mine.weight=2"),
        ("train", "data.mixed_with.art.shards=art"),
        ("train", "evaluation.sets.art=art"),
        ("evaluate", "metric_options.mine.path=art"),
    ],
)
def test_the_users_names_may_be_new(command: str, override: str) -> None:
    name, _, _ = override.partition("=")
    assert value(compose(command, [*(TINY if command == "train" else ["checkpoint=x", "out=y"]), override]), name)


@pytest.mark.parametrize("group", ["logger", "variant", "task", "criterion"])
def test_a_group_may_be_null(group: str) -> None:
    assert compose("train", [*TINY, f"{group}=null"]).get(group) is None


def test_null_leaves_out_what_an_experiment_chose(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults: [quickstart, override /logger: csv, _self_]\n"
    chosen = [configs(tmp_path, experiment__mine=text), "experiment=mine", "run_folder=nowhere"]
    assert set(compose("train", chosen).logger) == {"csv"}
    assert not compose("train", [*chosen, "logger=null"]).get("logger")


def test_knobs_of_a_group_at_null_change_what_a_stage_brings() -> None:
    overrides = [*TINY, "task.seed=5"]
    cfg = compose("train", overrides)
    assert [stage_config(cfg, stage, overrides).task.seed for stage in ("first_stage", "base")] == [5, 5]
    assert compose("sample", ["out=x", "sampler.eta=0.5"]).sampler == {"eta": 0.5}
    wrong = [*TINY, "task.sede=5"]
    with pytest.raises(UserError, match=r"task\.sede: .*did you mean seed"):
        check(stage_config(compose("train", wrong), "base", wrong).task, "task")


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", r"optimizer\.lrr: .*did you mean optimizer\.lr"),
        ("+optimizer.lrr=1", r"optimizer\.lrr: .*did you mean optimizer\.lr"),
        ("optimiser.lr=1", r"did you mean optimizer\.lr"),
        ("network.model_chanels=3", r"did you mean network\.model_channels"),
        ("+network.droput=0.1", r"network\.droput: "),
        ("sampelr=ddim", "sampelr: .*did you mean sampler"),
        ("ema.decay=0.5", r"did you mean callbacks\.ema\.decay"),
        ("checkpoint.keep=3", r"did you mean callbacks\.checkpoints\.keep"),
        ("samples.n=3", r"did you mean callbacks\.images\.n"),
        ("curriculum.bas.trainer.max_steps=1", r"did you mean curriculum\.base\.trainer\.max_steps"),
        ("curriculum.base.optimizer.lrr=1", r"curriculum\.base\.optimizer\.lrr"),
        ("conditioner.encoder.hiden_size=1", r"did you mean conditioner\.encoder\.hidden_size"),
        ("prediction=epsilom", "prediction=epsilom: .*did you mean epsilon"),
        ("experiment=quickstrat", "did you mean quickstart"),
        ("logger=[csv,wandbb]", "logger=wandbb: .*did you mean wandb"),
        ("sampler@samples.sampler=ddim", "give sampler=ddim"),
        ("dataset@data=latents", "no config group 'dataset'; did you mean data"),
        ("foo=1", "foo: there is no such knob"),
        ("+foo=1", "foo: there is no such knob"),
        ("++foo.bar=1", r"foo\.bar: there is no such knob"),
        ("experiment.foo=1", "experiment.foo: there is no such knob"),
        ("metric.fid.path=1", "metric.fid.path: there is no such knob"),
        ("callbacks.ema=false", r"callbacks\.ema=False: .*callbacks\.ema\.decay.*callbacks\.ema=null"),
        ("optimizer=1e-3", "optimizer=0.001: there is no such optimizer"),
        ("just_a_word", "expected name=value"),
        ("optimizer.lr=[1", "can't be read"),
    ],
)
def test_what_has_no_effect_is_refused_with_the_nearest_names(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose("train", [*TINY, override])


def test_unknown_names_in_a_stage_of_an_experiment_are_refused(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults: [quickstart, _self_]\ncurriculum: {base: {optimiser: {lr: 1}}}\n"
    overrides = [configs(tmp_path, experiment__mine=text), "experiment=mine", "run_folder=nowhere"]
    cfg = compose("train", overrides)
    with pytest.raises(UserError, match=r"curriculum\.base\.optimiser: .*did you mean optimizer"):
        stage_config(cfg, "base", overrides)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("foo: 1", "foo: nothing reads this key"),
        ("optimiser: {lr: 1}", "optimiser: nothing reads this key; did you mean optimizer"),
        ("metric: {fid: {n: 1}}", "metric: nothing reads this key"),
        ("width: 7\nnetwork: {model_channels: '${width}'}", None),
    ],
)
def test_a_root_key_of_an_experiment_is_read_or_refused(line: str, message: str | None, tmp_path: Path) -> None:
    text = f"# @package _global_\ndefaults: [quickstart, _self_]\n{line}\n"
    overrides = [configs(tmp_path, experiment__mine=text), "experiment=mine", "run_folder=nowhere"]
    if message is None:
        assert compose("train", overrides).network.model_channels == 7
    else:
        with pytest.raises(UserError, match=message):
            compose("train", overrides)


# ----------------------------------------------------------------------------------------------- another `_target_`


@pytest.mark.parametrize("variant", [[], ["variant=tiny"]])
def test_another_class_has_none_of_the_shipped_ones_knobs(variant: list[str], tmp_path: Path) -> None:
    """On the command line and in an experiment; variant=tiny then shrinks nothing of it."""
    text = f"# @package _global_\ndefaults: [quickstart, _self_]\nnetwork: {{_target_: {DIT}}}\n"
    for chosen in (
        [configs(tmp_path, experiment__mine=text), "experiment=mine"],
        ["experiment=quickstart", f"network._target_={DIT}"],
        ["experiment=quickstart", f"network={{_target_: {DIT}}}"],
    ):
        cfg = compose("train", [*chosen, *variant, "run_folder=nowhere"])
        assert cfg.network == {"_target_": DIT}
        check(cfg.network, "network")


def test_what_the_user_gives_the_other_class_stays_and_is_checked() -> None:
    cfg = compose(
        "train", [*TINY, "network._target_=torch.nn.Linear", "network.in_features=3", "network.out_features=4"]
    )
    assert cfg.network == {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 4}
    with pytest.raises(UserError, match=r"network\.out_featurs"):
        compose("train", [*TINY, "network._target_=torch.nn.Linear", "network.out_featurs=4"])
    cfg = compose("train", [*TINY, "network._target_=torch.nn.Linear", "network.model_channels=24"])
    with pytest.raises(UserError, match=r"network\.model_channels: .*Linear has no such knob"):
        check(cfg.network, "network")


def test_knobs_that_both_classes_have_stay() -> None:
    cfg = compose("train", [*TINY, "optimizer._target_=torch.optim.SGD", "optimizer.lr=0.25"])
    assert cfg.optimizer == {
        "_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.25, "weight_decay": 0.01, "fused": True,
        "betas": [0.9, 0.99],
    }  # fmt: skip
    with pytest.raises(UserError, match=r"optimizer\.betas: .*SGD has no such knob"):  # which the experiment gives
        check(cfg.optimizer, "optimizer")


# -------------------------------------------------------------------------------------------- folders of one's own


def test_a_folder_without_the_experiment_is_named_next_to_the_shipped_one(tmp_path: Path) -> None:
    search = configs(tmp_path, experiment__mine="# @package _global_\n")
    with pytest.raises(UserError) as caught:
        compose("train", [search, "experiment=minne"])
    assert "did you mean mine" in str(caught.value)
    assert str(tmp_path) in str(caught.value) and str(CONFIGS) in str(caught.value)


def test_options_are_looked_up_in_the_whole_search_path(tmp_path: Path) -> None:
    assert {"ddim", "plms"} <= set(options("sampler"))
    configs(tmp_path, sampler__mine="_target_: mine.Sampler\n", sampler__more="defaults: [mine]\neta: 1\n")
    with pytest.raises(UserError, match=r"sampler=ddmi: .*did you mean ddpm, ddim"):
        load_option("sampler", "ddmi")
    register_resolvers()
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert options("sampler") == ["mine", "more"]
        assert load_option("sampler", "mine") == {"_target_": "mine.Sampler"}
        assert load_option("sampler", "more") == {"_target_": "mine.Sampler", "eta": 1}


@pytest.mark.parametrize("group", ["callbacks", "logger"])
def test_two_files_that_define_one_name_are_refused(group: str, tmp_path: Path) -> None:
    first = "default" if group == "callbacks" else "csv"
    name = "ema" if group == "callbacks" else "csv"
    search = configs(tmp_path, **{f"{group}__mine": f"{name}: {{_target_: mine.Own}}\n", f"{group}__more": "b: {}\n"})
    with pytest.raises(UserError, match=rf"{group}\.{name}: both {group}/{name}\.yaml and {group}/mine\.yaml"):
        compose("train", [*TINY, search, f"{group}=[{first},mine]"])
    assert {name, "b"} <= set(compose("train", [*TINY, search, f"{group}=[{first},more]"])[group])


# ----------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    "text",
    [
        "a ${x}",
        "a red circle, at the left (really)",
        "it's [new], {odd}: a=b",
        "\\${x} \\",
        'a "quoted" word',
        "1e-3 #",
    ],
)
def test_texts_are_taken_letter_by_letter(text: str) -> None:
    overrides = with_texts([f"prompt={text}", "out=x"], ["prompt"])
    assert compose("sample", overrides).prompt == text


@pytest.mark.parametrize(
    ("given", "expected"), [("null", None), ("", ""), ("'a, ${seed}'", "a, 0"), ('"a, b"', "a, b")]
)
def test_null_and_quoted_texts_keep_hydras_meaning(given: str, expected: Any) -> None:
    assert compose("sample", with_texts([f"prompt={given}", "out=x"], ["prompt"])).prompt == expected


@pytest.mark.parametrize("name", ["data.train.where", "data.mixed_with.art.where", "curriculum.base.data.train.where"])
def test_filters_of_the_data_are_texts(name: str) -> None:
    from ldm.commands.train import TEXTS

    where = "AESTHETIC_SCORE > 5.0 and width >= 512, or (pwatermark < 0.5)"
    overrides = with_texts([*TINY, f"{name}={where}", "data.train.shards=[a,b]"], TEXTS)
    cfg = compose("train", overrides)
    assert value(cfg, name) == where and cfg.data.train.shards == ["a", "b"]


# ---------------------------------------------------------------------------------------------------------- sweeps


def multirun(*overrides: str) -> DictConfig:
    """The configuration of a sweep before its first job, Hydra's part included."""
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return loader.load_configuration("train", [*TINY, *overrides], RunMode.MULTIRUN)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("optimizer.lrr=1e-4,2e-4", r"did you mean optimizer\.lr"),
        ("optimizer.lrr=range(1,5)", r"did you mean optimizer\.lr"),
        ("optimizer.lrr=tag(log,interval(0.25,1e-3))", r"did you mean optimizer\.lr"),
        ("prediction=epsilon,epsilom", "prediction=epsilom: .*did you mean epsilon"),
        ("logger=csv,[csv,wandbb]", "logger=wandbb: .*did you mean wandb"),
        ("prediction=glob(z*)", r"prediction=glob\(z\*\): no prediction"),
    ],
)
def test_a_sweep_over_what_does_not_exist_is_refused_before_the_first_job(sweep: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        multirun(sweep)


@pytest.mark.parametrize(
    "sweep", ["optimizer.eps=1e-6,1e-7", "optimizer.lr=range(1,5)", "prediction=glob(e*)", "logger=csv,[csv,wandb]"]
)
def test_a_job_of_a_sweep_is_named_by_what_is_swept(sweep: str) -> None:
    cfg = multirun(sweep, "data.train.shards=a", "optimizer.weight_decay=0.5", "network=small")
    (setting,) = parse(list(cfg.hydra.overrides.hydra))
    assert setting.key_or_group == "hydra.job.config.override_dirname.exclude_keys"
    constant = {"experiment", "variant", "run_folder", "data.train.shards", "optimizer.weight_decay", "network"}
    assert set(setting.value()) == constant
