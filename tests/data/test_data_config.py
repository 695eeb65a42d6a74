"""The data's knobs through Hydra: they compose, are checked and become objects."""

from omegaconf import OmegaConf

from ldm.config.build import stage_config
from ldm.config.check import build
from ldm.config.compose import compose
from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.order.buckets import AspectRatios


def composed(*overrides: str) -> ShardDataModule:
    given = ["experiment=quickstart", "run_folder=nowhere", "data.train.shards=a", "data.val.shards=b", *overrides]
    cfg = stage_config(compose("train", given), "base", given)
    OmegaConf.resolve(cfg)
    found: ShardDataModule = build(cfg.data)
    return found


def test_filters_buckets_captions_and_mixtures_compose() -> None:
    found = composed(
        "data.train.where='score > 5.0 and width >= 512'",
        "data.train.captions={txt: 0.8, json.alt: 0.15, empty: 0.05}",
        "data.train.weight=0.8",
        "data.buckets={_target_: ldm.data.order.buckets.AspectRatios, step: 8}",
        "data.mixed_with={art: {_target_: ldm.data.loading.shard_source.ShardSource, shards: c, weight: 0.2}}",
        "data.decode=fast",
        "data.threads=2",
        "data.train.allow_damaged=true",
        "data.train.index=there",
    )
    assert found.sources["train"].allow_damaged and found.val is not None and not found.val.allow_damaged
    assert (found.sources["train"].index, found.val.index) == ("there", "there")
    assert found.sources["train"].where == "score > 5.0 and width >= 512"
    assert dict(found.sources["train"].captions or {}) == {"txt": 0.8, "json.alt": 0.15, "empty": 0.05}
    assert list(found.sources) == ["train", "art"] and found.sources["art"].weight == 0.2
    assert isinstance(found.buckets, AspectRatios) and found.buckets.step == 8
    assert (found.decode, found.threads) == ("fast", 2)


def test_the_stages_folder_is_where_bad_samples_are_listed() -> None:
    assert composed().folder is None and str(composed("stage_folder=x/base").folder) == "x/base"
