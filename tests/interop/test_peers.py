"""What is written, used by diffusers: its pipelines' images, its reading of single files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config.trained import load_trained
from ldm.diffusion.schedule import ScaledLinear, ZeroTerminalSNR
from ldm.generation import Generator, Request, SamplingSettings
from ldm.interop import nodes
from ldm.interop.convert import read
from ldm.interop.diffusers_folder import write_diffusers
from ldm.interop.own_folder import write_own
from ldm.interop.single_file import write_single_file
from ldm.sampling.ddim import DDIM
from ldm.sampling.grid import Grid, Leading, Trailing
from ldm.sampling.guidance import ClassifierFree
from ldm.sampling.noise import ImageNoise

from .tiny import SIDE, description, package, same, with_schedule

diffusers = pytest.importorskip("diffusers")

PROMPT, SEED, STEPS, SCALE = "a red circle above a blue square", 3, 4, 3.0
TOLERANCE = 2e-3  # of [0, 1]
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def statistics(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.linspace(-1.0, 1.0, channels), torch.linspace(2.0, 4.0, channels)


def ours(folder: Path, grid: Grid | None = None) -> torch.Tensor:
    """Our Generator's image [3, H, W]; without a grid on SD's times."""
    generator = Generator(load_trained(str(folder), "ema", "cpu").model)
    settings = SamplingSettings(DDIM(), grid or Leading(), ClassifierFree(), STEPS, SCALE)
    return generator.batch([Request({"caption": PROMPT}, SEED)], (SIDE, SIDE), settings)[0]


def theirs(pipeline: Any, **more: Any) -> torch.Tensor:
    """A pipeline's image [3, H, W], from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    latents = ImageNoise([SEED])((4, SIDE // 2, SIDE // 2))
    made = pipeline(
        PROMPT, height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=SCALE, latents=latents,
        output_type="pt", **more,
    )  # fmt: skip
    return made.images[0]


@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_gives_the_same_image(family: str, tmp_path: Path) -> None:
    model = package(family, tmp_path, statistics if family == "sd1" else None)
    write_own(model, tmp_path / "own")
    write_diffusers(model, tmp_path / "folder")
    wanted = ours(tmp_path / "own")
    pipeline = getattr(diffusers, PIPELINES[family])
    found = theirs(pipeline.from_pretrained(tmp_path / "folder", local_files_only=True))
    assert wanted.std() > 0.05
    assert (found - wanted).abs().max() < TOLERANCE

    write_single_file(model, tmp_path / "model.safetensors")
    config = str(tmp_path / "folder")
    if family == "sd1":  # the single file's first stage is at SD 1's scale factor, the folder's at 1
        config = str(tmp_path / "published")
        write_diffusers(package(family, tmp_path), tmp_path / "published")
    single = pipeline.from_single_file(str(tmp_path / "model.safetensors"), config=config, local_files_only=True)
    assert (theirs(single) - wanted).abs().max() < TOLERANCE


def test_the_schedules_are_the_same(tmp_path: Path) -> None:
    write_diffusers(package("sd2", tmp_path), tmp_path / "folder")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "folder", subfolder="scheduler")
    wanted = torch.from_numpy(ScaledLinear().alphas_cumprod).float()
    torch.testing.assert_close(scheduler.alphas_cumprod, wanted, rtol=1e-5, atol=0)
    assert scheduler.config.prediction_type == "v_prediction"


def test_zero_terminal_snr_is_theirs(tmp_path: Path) -> None:
    """The same schedule, and the same image from its last time, where nothing of the picture is left."""
    given = package("sd2", tmp_path)
    model = with_schedule(given, nodes.node(ZeroTerminalSNR, schedule=given.model["denoiser"]["schedule"]))
    write_own(model, tmp_path / "own")
    write_diffusers(model, tmp_path / "folder")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    wanted = torch.from_numpy(ZeroTerminalSNR(ScaledLinear()).alphas_cumprod).float()
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, wanted, rtol=1e-4, atol=1e-6)
    pipeline.scheduler.set_timesteps(STEPS)
    assert int(pipeline.scheduler.timesteps[0]) == 999
    assert (theirs(pipeline) - ours(tmp_path / "own", Trailing())).abs().max() < TOLERANCE


def test_the_refiner_loads(tmp_path: Path) -> None:
    write_diffusers(package("refiner", tmp_path), tmp_path / "folder")
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert pipeline.config.requires_aesthetics_score and pipeline.text_encoder is None


def test_inpainting_is_theirs(tmp_path: Path) -> None:
    """Their pipeline for it, and the same prediction of the nine channels that it gives its UNet."""
    write_own(package("inpainting", tmp_path), tmp_path / "own")
    write_diffusers(package("inpainting", tmp_path), tmp_path / "folder")
    pipeline = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    network = load_trained(str(tmp_path / "own"), "ema", "cpu").model.denoiser.network
    x, tokens = torch.randn(1, 9, 8, 8), torch.randn(1, 5, 64)
    with torch.no_grad():
        wanted = network(x[:, :4], torch.tensor([7.0]), tokens=tokens, concat=x[:, 4:])
        found = pipeline.unet(x, 7, encoder_hidden_states=tokens).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    picture, mask = torch.rand(1, 3, SIDE, SIDE), torch.zeros(1, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1.0
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        PROMPT, image=picture, mask_image=mask, height=SIDE, width=SIDE, num_inference_steps=2, output_type="pt"
    ).images
    assert made.shape == (1, 3, SIDE, SIDE) and bool(made.isfinite().all())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sdxl", {"safe_serialization": False, "variant": "fp16", "max_shard_size": "300KB"}),
        ("inpainting", {}),
    ],
)
def test_folders_that_they_save_are_read(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Their whole configurations, old pickles in parts, variants, another scheduler on the same betas."""
    given = package(family, tmp_path)
    write_diffusers(given, tmp_path / "folder")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "theirs", **options)
    found = read(tmp_path / "theirs")
    same(found.state, given.state)
    assert description(found.model) == description(given.model)
    assert found.config["data"] == given.config["data"]
