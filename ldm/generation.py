"""Generation: requests in, images out; the same for sample.py, for callbacks in training and for evaluation."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.checkpoint import write_atomic
from ldm.errors import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling.grid import Grid
from ldm.sampling.guidance import Guidance
from ldm.sampling.noise import ImageNoise
from ldm.sampling.sampler import OnStep, Sampler, start


@dataclass(frozen=True)
class Request:
    """One image to make: its condition, its seed, and what guidance leads away from ("" where not given)."""

    fields: Mapping[str, str]
    seed: int
    negative: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingSettings:
    """How images are made: the sampler, the times it visits, how many, and the guidance."""

    sampler: Sampler
    grid: Grid
    guidance: Guidance
    steps: int


class Generator:
    """Makes images from requests with a trained model, which is used as it is (its device, mode and weights).

    An image depends on its own request alone (seed, condition, settings), not on the batch it is made in.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        self.denoiser = model.denoiser
        self.conditioner = model.conditioner
        self.first_stage = model.first_stage

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of size (H, W) pixels; UserError where they do not divide."""
        self.first_stage.check_size(*size)
        factor = self.first_stage.factor
        return self.first_stage.latent_channels, size[0] // factor, size[1] // factor

    @torch.inference_mode()
    def batch(
        self,
        requests: Sequence[Request],
        size: tuple[int, int],
        settings: SamplingSettings,
        on_step: OnStep = lambda done: None,
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32, on the model's device, one for each request."""
        device = next(self.denoiser.parameters()).device
        shape = self.latent_shape(size)
        inputs, negative = self._conditions(requests)
        denoise = settings.guidance(self.denoiser, inputs, negative)

        schedule = self.denoiser.schedule
        times = settings.grid(schedule, settings.steps)
        noise = ImageNoise([request.seed for request in requests], device)
        z = start(noise(shape), times, schedule)
        z = settings.sampler(denoise, z, times, schedule, noise, on_step)
        return (self.first_stage.decode(z).float() * 0.5 + 0.5).clamp(0.0, 1.0)

    def generate(
        self,
        requests: Sequence[Request],
        size: tuple[int, int],
        settings: SamplingSettings,
        batch_size: int = 16,
        on_step: Callable[[int], object] = lambda images: None,
    ) -> Iterator[Tensor]:
        """Images [3, H, W] in [0, 1] in the order of the requests, made `batch_size` at a time.

        `on_step` is told, after each step, how many images took it.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: expected 1 or more")
        for first in range(0, len(requests), batch_size):
            part = requests[first : first + batch_size]
            yield from self.batch(part, size, settings, partial(_tell, on_step, len(part))).cpu()

    def _conditions(self, requests: Sequence[Request]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        names = requests[0].fields.keys()
        given = {name: [request.fields[name] for request in requests] for name in names}
        away = {name: [request.negative.get(name, "") for request in requests] for name in names}
        return self.conditioner(given, None).inputs(), self.conditioner(away, None).inputs()


def _tell(on_step: Callable[[int], object], images: int, done: int) -> None:
    on_step(images)


def save_image(image: Tensor, path: Path, facts: Mapping[str, object]) -> None:
    """Writes an image [3, H, W] in [0, 1] as PNG, with `facts` as JSON in its text chunk `ldm`."""
    pixels = (image.permute(1, 2, 0) * 255.0).round().to(torch.uint8).cpu().numpy()
    text = PngInfo()
    text.add_text("ldm", json.dumps(dict(facts)))
    with write_atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=text)
