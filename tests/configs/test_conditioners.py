"""Every configs/conditioner/*.yaml: shapes, dropout, the empty condition; tiny weights where a hub's are asked for."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.conditioning import Conditioner, captions_tokenizer, clip_text_for
from ldm.config.build import build
from ldm.config.compose import CONFIGS, compose

CONDITIONERS = sorted(path.stem for path in (CONFIGS / "conditioner").glob("*.yaml"))
FIELDS = {"caption": ["a red circle", "a large blue square at the upper left", ""]}


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CLIP text encoder of 77 tokens and its tokenizer."""
    path = tmp_path_factory.mktemp("text") / "model"
    tokenizer = captions_tokenizer(["a red circle", "a blue square"] * 3, path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip_text_for(tokenizer, hidden_size=16, layers=2, heads=2, intermediate=32).save_pretrained(path)
    return path


def put(node: Any, knob: str, value: str) -> None:
    """Sets a knob wherever it stands."""
    for name in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if name == knob:
            node[name] = value
        elif isinstance(node[name], DictConfig | ListConfig):
            put(node[name], knob, value)


@pytest.fixture(params=CONDITIONERS)
def conditioner(request: pytest.FixtureRequest, tiny_shapes: Path, text_model: Path, tmp_path: Path) -> Conditioner:
    overrides = ["experiment=quickstart", f"conditioner={request.param}", f"tokenizer_path={tmp_path}/tokenizer"]
    overrides += [f"data.train.shards={tiny_shapes}/train", f"run_folder={tmp_path}"]
    cfg = compose("train", overrides)
    OmegaConf.resolve(cfg.conditioner)
    node = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg.conditioner)))
    put(node, "name_or_path", str(text_model))
    node.dropout = 0.5
    return cast(Conditioner, build(node)).eval()


def test_it_conditions_each_sample_alone(conditioner: Conditioner) -> None:
    found = conditioner(FIELDS).inputs()
    assert found and all(len(value) == 3 for value in found.values())
    alone = conditioner({"caption": FIELDS["caption"][1:2]}).inputs()
    for name, value in found.items():
        assert value.is_floating_point() == alone[name].is_floating_point()
        torch.testing.assert_close(value[1:2], alone[name], atol=1e-5, rtol=1e-4)
        assert not torch.equal(value[0], value[1])


def test_the_empty_condition_is_that_of_no_words(conditioner: Conditioner) -> None:
    empty, none = conditioner.empty(2).inputs(), conditioner({"caption": ["", ""]}).inputs()
    assert empty.keys() == none.keys()
    for name in empty:
        torch.testing.assert_close(empty[name], none[name], atol=1e-5, rtol=1e-4)


def test_dropout_takes_its_share_and_depends_on_the_visit_alone(conditioner: Conditioner) -> None:
    keys = torch.arange(64)
    captions = {"caption": ["a red circle"] * 64}
    dropped, empty = conditioner(captions, keys), conditioner.empty(1).inputs()
    gone = torch.stack([
        torch.isclose(value, empty[name], atol=1e-5).flatten(1).all(1) for name, value in dropped.inputs().items()
    ]).all(0)  # fmt: skip
    assert 16 < int(gone.sum()) < 48
    again = conditioner(captions, keys).inputs()
    for name, value in dropped.inputs().items():
        torch.testing.assert_close(value, again[name])
    kept = conditioner(captions).inputs()
    for name, value in dropped.inputs().items():
        torch.testing.assert_close(value[~gone], kept[name][~gone], atol=1e-5, rtol=1e-4)
