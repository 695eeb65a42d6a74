"""CLIPScore with a tiny CLIP of random weights: preprocessing, truncation, sums."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from ldm.conditioning import captions_tokenizer
from ldm.errors import UserError
from ldm.evaluation.clip_score import CLIPScore, preprocess

CAPTIONS = ["a red circle above a blue square", "a blue circle", "a red square"]
LENGTH = 12
SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP and its tokenizer, as transformers saves them."""
    path = tmp_path_factory.mktemp("clip") / "model"
    tokenizer = captions_tokenizer(CAPTIONS * 3, path, max_length=LENGTH)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = layers | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = layers | {"image_size": SIZE, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        for parameter in model.parameters():  # CLIP's initial weights are too small to tell inputs apart
            parameter.data.normal_(0, 0.3)
        model.text_projection.weight.data.neg_()  # with this seed the cosines are positive
    model.save_pretrained(path)
    return path


@pytest.fixture
def metric(folder: Path) -> CLIPScore:
    return CLIPScore.from_pretrained(str(folder))


def images(n: int, size: int = 48) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(48, 48), (50, 70), (32, 32), (20, 24)])
def test_preprocessing_is_transformers(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    picture = np.array(smooth.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    expected = torch.as_tensor(np.asarray(processor(Image.fromarray(picture))["pixel_values"][0]))
    found = preprocess(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, SIZE)[0]
    assert (found - expected).abs().max() < 1.1 / 255 / 0.26  # a level


def test_the_score_is_the_cosine_of_the_models_features(metric: CLIPScore, folder: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(pixel_values=preprocess(images(3), SIZE), **tokens)
    cosine = F.cosine_similarity(outputs.image_embeds, outputs.text_embeds)
    assert torch.allclose(metric.scores(images(3), CAPTIONS), 100 * cosine.clamp(min=0), atol=1e-4)
    assert cosine.min() > 0 and cosine.std() > 0.01


def test_a_long_caption_keeps_its_end(metric: CLIPScore) -> None:
    """All that lies past the cut makes no difference, and the last token is the end of text."""
    long = "a red circle above a blue square " * 5
    ids = metric.tokenizer([long], truncation=True, max_length=metric.max_length)["input_ids"][0]
    assert len(ids) == LENGTH and ids[-1] == metric.tokenizer.eos_token_id
    one = images(1)
    assert torch.equal(metric.scores(one, [long]), metric.scores(one, [long + "and a dog"]))


def test_padding_and_batches_change_nothing(metric: CLIPScore) -> None:
    together = metric.scores(images(3), CAPTIONS)
    alone = torch.cat([metric.scores(images(3)[i : i + 1], CAPTIONS[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)
    metric.update(images(3)[:1], CAPTIONS[:1])
    metric.update(images(3)[1:], CAPTIONS[1:])
    assert float(metric.compute()) == pytest.approx(float(together.mean()), abs=1e-4)
    low, high = metric.interval()
    half = 1.96 * float(together.std()) / 3**0.5
    assert (low, high) == pytest.approx((float(together.mean()) - half, float(together.mean()) + half), rel=1e-3)


def test_it_says_what_it_depends_on(metric: CLIPScore, folder: Path) -> None:
    assert str(folder) in metric.description and "32" in metric.description


def test_what_is_missing_is_told(metric: CLIPScore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no CLIP model at"):
        CLIPScore.from_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="2 pictures but 1 captions"):
        metric.update(images(2), CAPTIONS[:1])
