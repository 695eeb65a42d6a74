"""CLIPScore with a tiny CLIP of random weights: preprocessing, truncation, sums."""

from pathlib import Path
from shutil import copytree, ignore_patterns

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from ldm.errors import UserError
from ldm.evaluation.clip_score import CLIPScore
from ldm.evaluation.metric import Batch
from ldm.evaluation.preparation import Preparation

CAPTIONS = ["a red circle above a blue square", "a blue circle", "a red square"]
LENGTH = 12
SIZE = 32
PREPARATION = Preparation(SIZE, (SIZE, SIZE))


@pytest.fixture
def metric(tiny_clip: Path) -> CLIPScore:
    return CLIPScore(str(tiny_clip))


def images(n: int, size: int = 48) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(48, 48), (50, 70), (32, 32), (20, 24)])
def test_preprocessing_is_transformers(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    picture = np.array(smooth.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    expected = torch.as_tensor(np.asarray(processor(Image.fromarray(picture))["pixel_values"][0]))
    found = PREPARATION(torch.from_numpy(picture).permute(2, 0, 1)[None].float())[0]
    assert (found - expected).abs().max() < 1.1 / 255 / 0.26  # a level


def test_the_score_is_the_cosine_of_the_models_features(metric: CLIPScore, tiny_clip: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip), CLIPTokenizer.from_pretrained(tiny_clip)
    tokens = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(pixel_values=PREPARATION((images(3) * 255).round()), **tokens)
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
    metric.update(Batch(images(3)[:1], CAPTIONS[:1], torch.arange(1)))
    metric.update(Batch(images(3)[1:], CAPTIONS[1:], torch.arange(1, 3)))
    value, low, high, _ = metric.compute()["clip_score"]
    assert value == pytest.approx(float(together.mean()), abs=1e-4)
    half = 1.96 * float(together.std()) / 3**0.5
    assert (low, high) == pytest.approx((float(together.mean()) - half, float(together.mean()) + half), rel=1e-3)


def test_it_says_what_it_depends_on(metric: CLIPScore, tiny_clip: Path) -> None:
    assert metric.preparation == PREPARATION
    (description,) = metric.descriptions().values()
    assert str(tiny_clip) in description and "32" in description


def test_what_is_missing_is_reported(metric: CLIPScore, tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model at .*hf download"):
        CLIPScore(str(tmp_path))
    copied = tmp_path / "clip"
    copytree(tiny_clip, copied, ignore=ignore_patterns("token*", "vocab*", "merges*"))
    with pytest.raises(UserError, match="no tokenizer at"):
        CLIPScore(str(copied))
    with pytest.raises(UserError, match="2 pictures but 1 captions"):
        metric.update(Batch(images(2), CAPTIONS[:1], torch.arange(2)))
