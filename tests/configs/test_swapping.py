"""Another first stage, text encoder, set of conditions or network is one override, or is refused with the reason."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import load_tensors
from ldm.config.build import stages
from ldm.config.check import build, check
from ldm.config.compose import compose
from ldm.config.infer import check_fit, fill_widths
from ldm.config.stages import stage_config
from ldm.errors import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.networks.unet import UNet
from ldm.training import curriculum

NO_IMAGES = "callbacks.images=null"
pytestmark = pytest.mark.usefixtures("hub")
Widths = tuple[int, int, int | None, int | None]


def swapped(*more: str) -> DictConfig:
    """The configuration of SD 1's base under overrides, compared with its constructors and in itself."""
    given = ["experiment=sd1"] if not any(text.startswith("experiment=") for text in more) else []
    given += [
        "run_folder=nowhere",
        "data.train.shards=nowhere",
        "data.val.shards=nowhere",
        "first_stage_loss=kl",
        *more,
    ]
    cfg = compose("train", given)
    config = stage_config(cfg, "base", given)
    fill_widths(config)
    check_fit(config, list(cfg.curriculum))
    OmegaConf.resolve(config)
    check(config.task, "task")
    return config


@pytest.mark.parametrize(
    ("experiment", "override"),
    [("emoji", "conditioner=none"), ("emoji", "first_stage=vq_f4"), ("shapes_relations", "conditioner=imagenet_class")],
)
def test_other_experiments_parts_are_swapped_too(
    experiment: str, override: str, tiny_shapes: Path, tmp_path: Path
) -> None:
    captions = [f"data.train.shards={tiny_shapes}/train", f"tokenizer_path={tmp_path}/tokenizer"]
    swapped(f"experiment={experiment}", override, *captions)


def widths(network: Any) -> Widths:
    return network.in_channels, network.out_channels, network.context_dim, network.vector_dim


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("first_stage=kl_f8_sdxl", (4, 4, 768, None)),
        ("first_stage=kl_f4", (3, 3, 768, None)),
        ("first_stage=kl_f16", (16, 16, 768, None)),
        ("first_stage=vq_f4", (3, 3, 768, None)),
        ("first_stage=vq_f16", (8, 8, 768, None)),
        ("first_stage.latent_channels=16", (16, 16, 768, None)),
        ("conditioner=openclip_h", (4, 4, 1024, None)),
        ("conditioner=sdxl", (4, 4, 2048, 2816)),
        ("conditioner=sdxl_text", (4, 4, 2048, 1280)),
        ("conditioner=sdxl_refiner", (4, 4, 1280, 2560)),
        ("conditioner=t5", (4, 4, 4096, None)),
        ("conditioner=sd3_text", (4, 4, 4096, 2048)),
        ("conditioner=imagenet_class", (4, 4, 512, None)),
        ("conditioner=clip_l_masked_image", (9, 4, 768, None)),
        ("conditioner=low_resolution", (7, 4, None, None)),
        ("conditioner=none", (4, 4, None, None)),
        ("network=small", (4, 4, 768, None)),
    ],
)
def test_the_network_takes_the_widths_of_the_conditioner_and_the_first_stage(override: str, wanted: Widths) -> None:
    config = swapped(override, *[NO_IMAGES] * (override == "conditioner=low_resolution"))
    with torch.device("meta"):
        conditioner, first_stage = build(config.conditioner), build(config.first_stage)
    latents = first_stage.latent_channels
    tokens, vector, concat = conditioner.widths(latents)
    assert (latents + concat, latents, tokens or None, vector or None) == wanted == widths(config.network)
    assert config.first_stage.decoder.in_channels == wanted[1]


def test_a_text_encoder_in_a_folder_is_one_override(tiny_clip: Path) -> None:
    config = swapped(f"conditioner.encoder.name_or_path={tiny_clip}", "conditioner.max_length=12")
    assert (config.network.context_dim, config.conditioner.tokenizer.name_or_path) == (16, str(tiny_clip))
    assert build(config.conditioner).widths(4) == (16, 0, 0)
    second = "conditioner.conditioners.1"
    config = swapped("conditioner=sdxl", f"{second}.encoder.name_or_path={tiny_clip}", f"{second}.max_length=12")
    assert widths(config.network) == (4, 4, 768 + 16, 8 + 6 * 256)
    part = config.conditioner.conditioners[1]
    assert part.tokenizer.name_or_path == part.projection.name_or_path == str(tiny_clip)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["network=sdxl"], "tokens of 768 numbers, the network has context_dim=2048. Give network.context_dim=768"),
        (["network=sd2"], "tokens of 768 numbers, the network has context_dim=1024"),
        (["network=sdxl", "conditioner=sdxl_text"], "a vector of 1280 numbers, the network has vector_dim=2816"),
        (["network=sd2", "conditioner=none"], "gives no tokens, the network has context_dim=1024"),
        (["network=ldm_churches_f8"], "tokens of 768 numbers, the network has context_dim=None"),
        (["network=ldm_imagenet_f4", "conditioner=imagenet_class"], "latents of 4 channels .* has in_channels=3"),
        (["network=sdxl", "conditioner=sdxl", "first_stage=kl_f16"], "latents of 16 channels .* has in_channels=4"),
        (["network=sd1_inpainting"], "the conditioner adds 0; the network has in_channels=9"),
        (["network.in_channels=9"], "Give network.in_channels=4 network.out_channels=4, or another first stage"),
        (["network.context_dim=24"], "the network has context_dim=24"),
        (["network.num_heads=7"], "channels do not split into heads with num_heads=7"),
        (["network.channel_mult=[1,2]"], "has 4 entries; channel_mult has 2 levels"),
        (
            ["first_stage.encoder.channel_mult=[1,2]", "first_stage.decoder.channel_mult=[1,2,4]"],
            "divides the size by 2",
        ),
        (["first_stage=kl_f32", "data.size=200"], "200x200 do not divide by the first stage's factor 32"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        swapped(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["network=sd2", "conditioner=openclip_h", "prediction=v"],
        ["network=sdxl", "conditioner=sdxl", "first_stage=kl_f8_sdxl"],
        ["network=sdxl_refiner", "conditioner=sdxl_refiner", "first_stage=kl_f8_sdxl"],
        ["network=sd1_inpainting", "conditioner=clip_l_masked_image"],
        ["network=ldm_imagenet_f4", "conditioner=imagenet_class", "first_stage=vq_f4"],
        ["network=ldm_imagenet_f8", "conditioner=imagenet_class", "first_stage=vq_f8"],
        ["network=ldm_unconditional_f4", "conditioner=none", "first_stage=vq_f4"],
        ["network=ldm_churches_f8", "conditioner=none"],
        ["network=ldm_super_resolution", "conditioner=low_resolution", "first_stage=vq_f4", NO_IMAGES],
        ["network=ldm_inpainting", "conditioner=masked_image", "first_stage=vq_f4_noattn"],
    ],
)
def test_published_combinations_fit(overrides: list[str]) -> None:
    swapped(*overrides)


@pytest.mark.parametrize("loss", ["kl", "kl_efficientnet_gan", "kl_lpips_gan", "vq_lpips_gan"])
@pytest.mark.parametrize(("first_stage", "reduction"), [("kl_f8", "sum"), ("vq_f4", "mean")])
def test_the_loss_is_reduced_as_the_regularizer_asks(loss: str, first_stage: str, reduction: str) -> None:
    path = ["+first_stage_loss.perceptual.network.path=nowhere"] if "lpips" in loss else []
    config = compose(
        "train", ["experiment=quickstart", f"first_stage={first_stage}", f"first_stage_loss={loss}", *path]
    )
    regularizer = build(config.first_stage, "first_stage").regularizer
    assert config.first_stage_loss.reduction is None and regularizer.reduction == reduction
    assert first_stage != "kl_f8" or regularizer.kl_weight == 1e-6


@pytest.mark.parametrize("first_stage", ["kl_f8", "vq_f4"])
def test_the_small_picture_is_as_small_as_the_latents(first_stage: str) -> None:
    config = swapped("conditioner=low_resolution", f"first_stage={first_stage}", NO_IMAGES)
    conditioner, stage = build(config.conditioner), build(config.first_stage)
    conditioner.bind(stage)
    picture = torch.zeros(1, 3, 16, 32)
    assert conditioner({"image": picture}).concat.shape[2:] == stage.encode(picture).shape[2:]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["conditioner=clip_l_masked_image", "latents=auto"], r"\(MaskedImage\) is shown the pictures, .*latents=null"),
        (["conditioner=low_resolution"], r"\(LowResolution\) makes nothing of a prompt .*callbacks.images=null"),
    ],
)
def test_a_conditioner_that_is_shown_pictures_is_refused_where_there_are_none(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        swapped(*overrides)


def launch(shapes: Path, out: Path, *more: str) -> list[str]:
    given = ["experiment=quickstart", "variant=tiny", f"run_folder={out}", "callbacks.progress=null"]
    return [*given, f"data.train.shards={shapes}/train", f"data.val.shards={shapes}/val", *more]


@pytest.mark.parametrize("override", ["first_stage=vq_f4", "conditioner=none", "network=ldm_churches_f8"])
def test_a_swapped_part_trains_in_miniature(override: str, tiny_shapes: Path, tmp_path: Path) -> None:
    overrides = launch(tiny_shapes, tmp_path, "stages=[first_stage,base]", override)
    curriculum.run(*stages(compose("train", overrides), overrides, tmp_path))
    state, _ = load_tensors(tmp_path / "base" / "model" / "weights.safetensors")
    assert ("first_stage.regularizer.codebook.weight" in state) == (override == "first_stage=vq_f4")
    assert any(name.startswith("conditioner.") for name in state) == (override != "conditioner=none")


def test_widths_follow_the_first_stage_of_another_run(tiny_shapes: Path, tmp_path: Path) -> None:
    trained = launch(tiny_shapes, tmp_path / "a", "stages=[first_stage]", "first_stage.latent_channels=7")
    curriculum.run(*stages(compose("train", trained), trained, tmp_path / "a"))
    source = f"first_stage_from={tmp_path}/a/first_stage"
    given = launch(tiny_shapes, tmp_path / "b", "stages=[base]", source)
    ((stage,), models) = stages(compose("train", given), given, tmp_path / "b")
    model = cast(LatentDiffusion, stage.build(models).module.export_module)
    assert cast(UNet, model.denoiser.network).in_channels == model.first_stage.latent_channels == 7
    refused = [*given, "network.in_channels=4", "network.out_channels=4"]
    ((stage,), models) = stages(compose("train", refused), refused, tmp_path / "b")
    with pytest.raises(Exception) as caught:
        stage.build(models)
    assert "latents of 7 channels" in str(caught.value.__cause__ or caught.value)
