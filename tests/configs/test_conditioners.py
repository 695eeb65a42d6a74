"""Every configs/conditioner/*.yaml: shapes, dropout, the empty condition; tiny weights where a hub's are asked for."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ldm.conditioning import Conditioner, captions_tokenizer
from ldm.config.build import build
from ldm.config.compose import CONFIGS, compose
from ldm.config.infer import planned_widths

CONDITIONERS = sorted(path.stem for path in (CONFIGS / "conditioner").glob("*.yaml"))
PICTURES = ("low_resolution", "masked_image", "clip_l_masked_image")  # what they condition on is no text
NUMBERS = {"imagenet_class": ["3", "14", ""]}
TEXTS = ("captions", "captions_tiny", "captions_emoji", "captions_relations", "clip_l", "openclip_h")
DROPS = (*TEXTS, "sdxl", "sdxl_text", "sdxl_refiner", "imagenet_class")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CLIP text encoder of 77 tokens and its tokenizer."""
    path = tmp_path_factory.mktemp("text") / "model"
    tokenizer = captions_tokenizer(["a red circle", "a blue square"] * 3, path)
    vocab, end = len(tokenizer), tokenizer.eos_token_id
    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModelWithProjection(config).save_pretrained(path)
    return path


def put(node: Any, knob: str, value: Any) -> None:
    """Sets a knob wherever it stands."""
    for name in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if name == knob:
            node[name] = value
        elif isinstance(node[name], DictConfig | ListConfig):
            put(node[name], knob, value)


def fields(name: str) -> dict[str, Any]:
    """Three samples: two that differ, and one whose text is empty."""
    texts = NUMBERS.get(name, ["a red circle", "a large blue square at the upper left", ""])
    image = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(3, 1, 16, 16)
    mask[:, :, :8] = 1.0
    return {"caption": texts, "image": image, "mask": mask}


@pytest.fixture
def conditioner(request: pytest.FixtureRequest, tiny_shapes: Path, text_model: Path, tmp_path: Path) -> Conditioner:
    overrides = ["experiment=quickstart", f"conditioner={request.param}", f"tokenizer_path={tmp_path}/tokenizer"]
    overrides += [f"data.train.shards={tiny_shapes}/train", f"run_folder={tmp_path}"]
    cfg = compose("train", overrides)
    OmegaConf.resolve(cfg.conditioner)
    node = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg.conditioner)))
    put(node, "name_or_path", str(text_model))
    put(node, "dropout", 0.5)
    made = cast(Conditioner, build(node)).eval()
    assert planned_widths(node, 4) == made.widths(4)
    made.bind(lambda images: torch.nn.functional.avg_pool2d(images, 4).repeat(1, 2, 1, 1)[:, :4])
    return made


def parametrized(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("conditioner", "name"), [(n, n) for n in names], indirect=["conditioner"])


@parametrized(name for name in CONDITIONERS if name != "none")
def test_it_conditions_each_sample_alone(conditioner: Conditioner, name: str) -> None:
    given = fields(name)
    found = conditioner(given).inputs()
    assert found and all(len(value) == 3 for value in found.values())
    alone = conditioner({field: value[1:2] for field, value in given.items()}).inputs()
    for part, value in found.items():
        assert value.is_floating_point() == alone[part].is_floating_point()
        torch.testing.assert_close(value[1:2], alone[part], atol=1e-5, rtol=1e-4)
        assert not torch.equal(value[0], value[1])
    sizes = {"tokens": 2, "vector": 1, "concat": 1}
    widths = {part: found[part].shape[dim] if part in found else 0 for part, dim in sizes.items()}
    assert conditioner.widths(4)._asdict() == widths


@parametrized(name for name in CONDITIONERS if name not in PICTURES)
def test_the_empty_condition_is_that_of_no_words(conditioner: Conditioner, name: str) -> None:
    empty = conditioner.empty(2).inputs()
    none = conditioner({"caption": ["", ""], "aesthetic_score": ["", ""]}).inputs()
    assert empty.keys() == none.keys()
    for part in empty:
        torch.testing.assert_close(empty[part], none[part], atol=1e-5, rtol=1e-4)


@parametrized(DROPS)
def test_dropout_takes_its_share_and_depends_on_the_visit_alone(conditioner: Conditioner, name: str) -> None:
    keys = torch.arange(64)
    given = {"caption": fields(name)["caption"][:1] * 64, "aesthetic_score": [""] * 64}
    dropped, empty = conditioner(given, keys), conditioner.empty(1).inputs()
    gone = torch.stack([
        torch.isclose(value, empty[part], atol=1e-5).flatten(1).all(1) for part, value in dropped.inputs().items()
    ]).all(0)  # fmt: skip
    assert 16 < int(gone.sum()) < 48
    again = conditioner(given, keys).inputs()
    for part, value in dropped.inputs().items():
        torch.testing.assert_close(value, again[part])
    kept = conditioner(given).inputs()
    for part, value in dropped.inputs().items():
        torch.testing.assert_close(value[~gone], kept[part][~gone], atol=1e-5, rtol=1e-4)


def test_every_conditioner_that_drops_is_tested_for_it() -> None:
    texts = {path.stem for path in (CONFIGS / "conditioner").glob("*.yaml") if "dropout" in path.read_text()}
    inherits = {"openclip_h", "captions_tiny", "captions_emoji", "captions_relations"}
    assert texts - inherits == set(DROPS) - inherits | {"clip_l_masked_image"}
