"""Every configs/conditioner/*.yaml: shapes, widths and dropout, with tiny weights for those of the hub."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from ldm.conditioning import Conditioner, captions_tokenizer
from ldm.config.build import build
from ldm.config.compose import CONFIGS, compose

CONDITIONERS = sorted(path.stem for path in (CONFIGS / "conditioner").glob("*.yaml"))
NUMBERS = {"imagenet_class": ["3", "14", ""]}
TEXTS = ("captions", "captions_tiny", "captions_emoji", "captions_relations", "clip_l", "openclip_h", "t5")
DROPS = (*TEXTS, "sdxl", "sdxl_text", "sdxl_refiner", "sd3_text", "imagenet_class")


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


class Average:
    """A first stage of factor 4 whose latents are means of pixels, in 4 channels."""

    factor = 4

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 4).repeat(1, 2, 1, 1)[:, :4]


def put(node: Any, knob: str, value: Callable[[Any], Any]) -> None:
    """Replaces the value of a knob wherever it stands."""
    for name in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if name == knob:
            node[name] = value(node[name])
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
def conditioner(
    request: pytest.FixtureRequest, tiny_shapes: Path, text_model: Path, tiny_t5: Path, tmp_path: Path
) -> Conditioner:
    overrides = ["experiment=quickstart", f"conditioner={request.param}", f"tokenizer_path={tmp_path}/tokenizer"]
    overrides += [f"data.train.shards={tiny_shapes}/train", f"run_folder={tmp_path}"]
    cfg = compose("train", overrides)
    OmegaConf.resolve(cfg.conditioner)
    node = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg.conditioner)))
    put(node, "name_or_path", lambda name: str(tiny_t5 if "t5" in name else text_model))
    put(node, "dropout", lambda rate: 0.5)
    made = cast(Conditioner, build(node)).eval()
    made.bind(Average())
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


@parametrized(DROPS)
def test_dropout_takes_its_share_and_depends_on_the_visit_alone(conditioner: Conditioner, name: str) -> None:
    keys = torch.arange(64)
    given = {"caption": fields(name)["caption"][:1] * 64, "aesthetic_score": [""] * 64}
    dropped, empty = conditioner(given, keys), conditioner({"caption": [""], "aesthetic_score": [""]}).inputs()
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


@torch.no_grad()
@pytest.mark.parametrize("conditioner", ["sd3_text"], indirect=True)
def test_sd3_text_is_what_diffusers_pipeline_makes_of_it(
    conditioner: Conditioner, text_model: Path, tiny_t5: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    second = CLIPTokenizer.from_pretrained(text_model, pad_token="!")
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=CLIPTextModelWithProjection.from_pretrained(text_model).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(text_model),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(text_model).eval(),
        tokenizer_2=second,
        text_encoder_3=T5EncoderModel.from_pretrained(tiny_t5).eval(),
        tokenizer_3=AutoTokenizer.from_pretrained(tiny_t5),
    )
    captions = ["a red circle", "a large blue square at the upper left", ""]
    tokens, _, vector, _ = pipeline.encode_prompt(captions, None, None, "cpu", do_classifier_free_guidance=False)
    found = conditioner({"caption": captions})
    assert found.tokens is not None and found.vector is not None and found.mask is None
    assert found.tokens.shape == (3, 77 + 256, 40)
    assert torch.equal(found.tokens, tokens) and torch.equal(found.vector, vector)
