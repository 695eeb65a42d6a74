"""Vision models of transformers as feature networks: their own outputs, their own preprocessing, clear errors."""

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Model,
)

from ldm.errors import UserError
from ldm.evaluation.preparation import Preparation
from ldm.evaluation.vision import ClassTokenFeatures, ClipFeatures, PooledFeatures, VisionFeatures


def picture(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def prepared(processor: CLIPImageProcessorPil | BitImageProcessorPil, image: Image.Image) -> torch.Tensor:
    return torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))[None]


def test_clip_gives_its_projected_embedding(tiny_clip: Path) -> None:
    features, image = ClipFeatures(str(tiny_clip)), picture(48, 60)
    inputs = prepared(CLIPImageProcessorPil.from_pretrained(tiny_clip), image)
    expected = CLIPModel.from_pretrained(tiny_clip).get_image_features(pixel_values=inputs).pooler_output
    assert features(tensor(image)).shape == (1, 8)
    assert torch.allclose(features(tensor(image)), expected, atol=0.02)  # a level of 255 in the input
    assert features.frechet_label == "Frechet(tiny-clip)" and features.kernel_label == "Kernel(tiny-clip)"
    for part in (features.fingerprint, "image_embeds", "bicubic antialias to 32, centre crop 32x32"):
        assert part in features.description


def test_dinov2_gives_its_class_token(tiny_dinov2: Path) -> None:
    features, image = ClassTokenFeatures(str(tiny_dinov2), name="facebook/dinov2-tiny"), picture(64, 40)
    model = Dinov2Model.from_pretrained(tiny_dinov2)
    inputs = prepared(BitImageProcessorPil.from_pretrained(tiny_dinov2), image)
    expected = model(pixel_values=inputs).last_hidden_state[:, 0]
    assert inputs.shape[-2:] == (28, 28)
    assert torch.allclose(features(tensor(image)), expected, atol=0.05) and expected.std() > 0.5
    assert features.frechet_label == "Frechet(facebook/dinov2-tiny)"
    pooled = PooledFeatures(str(tiny_dinov2))
    assert torch.allclose(pooled(tensor(image)), features(tensor(image)))  # DINOv2 pools by its class token
    assert pooled.description != features.description


def test_of_a_model_with_a_text_half_the_pictures_half_is_taken(tiny_clip: Path) -> None:
    pooled = PooledFeatures(str(tiny_clip))
    model = CLIPVisionModel.from_pretrained(tiny_clip)
    pixels = pooled.preparation(torch.full((1, 3, 32, 32), 51.0))
    assert torch.allclose(pooled(torch.full((1, 3, 32, 32), 0.2)), model(pixel_values=pixels).pooler_output)


def test_features_do_not_depend_on_the_batch(tiny_dinov2: Path) -> None:
    features = ClassTokenFeatures(str(tiny_dinov2))
    images = torch.rand(5, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(features(images)[2:3], features(images[2:3]), atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": {"height": 32, "width": 24}, "resample": 2}, "bilinear antialias to 32x24, centre crop 32x24"),
        ({"size": 32, "resample": 3}, "bicubic antialias to 32, centre crop 32x32"),
        ({"size": {"shortest_edge": 40}, "resample": 3, "crop_size": 32}, "bicubic antialias to 40, centre crop 32x32"),
    ],
)
def test_image_processors_are_followed(processor: dict[str, object], expected: str) -> None:
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": "crop_size" in processor}
    if processor["size"] == 32:
        processor["do_center_crop"], processor["crop_size"] = True, {"height": 32, "width": 32}
    preparation = Preparation.from_processor(processor, "x")
    assert str(preparation) == expected
    out = preparation(torch.full((1, 3, 50, 60), 255.0))
    assert out.shape[-2:] == preparation.crop and torch.allclose(out, torch.ones(()))


@pytest.mark.parametrize("change", [{"resample": 1}, {"size": {}}, {"image_mean": None}, {"do_center_crop": False}])
def test_image_processors_that_cannot_be_followed_are_refused(change: dict[str, object], tiny_clip: Path) -> None:
    processor = json.loads((tiny_clip / "preprocessor_config.json").read_text()) | change
    with pytest.raises(UserError, match=r"preprocessor_config.json has to give"):
        Preparation.from_processor(processor, "x")
    with pytest.raises(UserError, match="does not fit"):
        Preparation(32, (33, 32))


@pytest.mark.parametrize("kind", [ClipFeatures, ClassTokenFeatures, PooledFeatures])
def test_a_model_that_is_not_there_is_reported_with_how_to_get_it(kind: type[VisionFeatures]) -> None:
    with pytest.raises(UserError, match="hf download facebook/dinov2-large --local-dir FOLDER"):
        kind("facebook/dinov2-large")


def test_weights_are_never_drawn_at_random_and_the_processor_is_needed(
    tiny_clip: Path, tiny_dinov2: Path, tmp_path: Path
) -> None:
    config = CLIPVisionConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8)
    CLIPVisionModel(config).save_pretrained(tmp_path / "no_projection")
    with pytest.raises(UserError, match=r"lacks 1 weights of CLIPVisionModelWithProjection, e.g. visual_projection"):
        ClipFeatures(str(tmp_path / "no_projection"))
    copytree(tiny_dinov2, tmp_path / "no_processor")
    (tmp_path / "no_processor" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config.json"):
        ClassTokenFeatures(str(tmp_path / "no_processor"))
