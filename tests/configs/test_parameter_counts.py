"""Every published architecture that is shipped has its published number of parameters, counted without memory."""

import pytest
import torch
from torch import nn

from ldm.conditioning import TextConditioner, text_encoder_from_pretrained
from ldm.config.build import build
from ldm.config.compose import CONFIGS, compose
from ldm.networks.controlnet import ControlNet
from tests.configs.nodes import node

NETWORKS = {
    "sd1": 859_520_964,
    "sd1_inpainting": 859_535_364,
    "sd2": 865_910_724,
    "sdxl": 2_567_463_684,
    "sdxl_refiner": 2_259_526_660,
    "ldm_text_to_image": 872_300_484,
    "ldm_imagenet_f4": 400_920_579,
    "ldm_imagenet_f8": 394_984_196,
    "ldm_unconditional_f4": 274_056_163,
    "ldm_churches_f8": 294_966_916,
    "ldm_super_resolution": 113_622_563,
    "ldm_inpainting": 387_245_827,
}
FIRST_STAGES = {
    "kl_f4": 55_312_063,
    "kl_f8": 83_653_863,
    "kl_f8_sdxl": 83_653_863,
    "kl_f16": 69_610_963,
    "kl_f32": 103_880_131,
    "vq_f4": 55_322_782,
    "vq_f4_noattn": 53_219_486,
    "vq_f8": 67_717_295,
    "vq_f8_n256": 67_652_783,
    "vq_f16": 69_593_371,
}
CONDITIONERS = {
    "clip_l": [123_060_480],
    "openclip_h": [340_387_840],
    "sdxl": [123_060_480, 694_659_840],
    "sdxl_text": [123_060_480, 694_659_840],
    "sdxl_refiner": [694_659_840],
    "clip_l_masked_image": [123_060_480],
    "t5": [4_762_310_656],
    "sd3_text": [123_060_480 + 768 * 768, 694_659_840, 4_762_310_656],
}
OWN = {"network": {"small"}, "first_stage": {"kl_f4_small", "kl_f8_small"}}  # this project's, not published


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("group", "name", "parameters"),
    [("network", *row) for row in NETWORKS.items()] + [("first_stage", *row) for row in FIRST_STAGES.items()],
)
def test_published_parameter_counts(group: str, name: str, parameters: int) -> None:
    with torch.device("meta"):
        module = build(node(group, name))
    assert all(p.is_meta for p in module.parameters())
    assert count(module) == parameters


def test_the_controlnet_of_sd_1_has_its_published_size() -> None:
    with torch.device("meta"):
        assert count(ControlNet(build(node("network", "sd1")))) == 361_279_120


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", CONDITIONERS)
def test_published_text_encoders(name: str) -> None:
    with torch.device("meta"):
        conditioner = build(node("conditioner", name))
    parts = [part for part in conditioner.modules() if isinstance(part, TextConditioner)]
    assert [count(part) for part in parts] == CONDITIONERS[name]


@pytest.mark.usefixtures("hub")
def test_openclip_h_has_24_layers_of_which_sd2_uses_23() -> None:
    name = node("conditioner", "openclip_h").encoder.name_or_path
    assert count(text_encoder_from_pretrained(name)) == 352_984_064


def test_the_discriminator_has_its_published_size() -> None:
    path = "first_stage_loss.perceptual.network.path=nowhere"
    cfg = compose("train", ["experiment=sd1", "first_stage_loss=vq_lpips_gan", path])
    with torch.device("meta"):
        assert count(build(cfg.first_stage_loss.discriminator)) == 2_765_633


@pytest.mark.parametrize(("group", "counted"), [("network", NETWORKS), ("first_stage", FIRST_STAGES)])
def test_every_shipped_architecture_is_counted(group: str, counted: dict[str, int]) -> None:
    shipped = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
    assert shipped == set(counted) | OWN[group]
