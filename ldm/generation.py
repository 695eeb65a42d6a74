"""Generation: requests in, images out; the same for sample.py, for callbacks in training and for evaluation."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.checkpoint import write_atomic
from ldm.conditioning.text import Fields
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling.grid import Grid
from ldm.sampling.guidance import Guidance
from ldm.sampling.image_to_image import noised, remaining, steps_made
from ldm.sampling.inpainting import keeping, latent_mask
from ldm.sampling.noise import ImageNoise
from ldm.sampling.sampler import OnStep, Sampler, start, steps_of

log = logging.getLogger(__name__)

BATCH_SIZES = {"cuda": 64, "cpu": 16}  # to begin with, where the user names none


@dataclass(frozen=True, eq=False)
class Request:
    """One image to make: its condition, its seed, and what guidance leads away from ("" where not given).

    image  [3, H, W] in [-1, 1]: what it is made from (image to image, inpainting); None: from noise alone
    mask   [1, H, W] in [0, 1], 1 where it is painted anew; None: everywhere
    """

    fields: Mapping[str, str]
    seed: int
    negative: Mapping[str, str] = field(default_factory=dict)
    image: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """How images are made: the sampler, the times it visits, how many, and the guidance.

    `strength` in (0, 1] is the share of the steps that an image to image makes; 1 begins from noise alone.
    """

    sampler: Sampler
    grid: Grid
    guidance: Guidance
    steps: int
    strength: float = 1.0
    guidance_scale: float | None = None  # shim: until a guidance takes the scale in its call

    @property
    def steps_made(self) -> int:
        """The steps of one image; UserError for a strength out of range."""
        return steps_made(self.steps, self.strength)

    def times(self, schedule: Schedule) -> Tensor:
        """The times visited, [steps_made + 1]; UserError for steps or a strength out of range."""
        return remaining(self.grid(schedule, self.steps), self.strength)


class Generator:
    """Makes images from requests with a trained model, which is used as it is (its device, mode and weights).

    An image depends on its own request alone (seed, condition, settings), not on the batch it is made in.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        self.denoiser = model.denoiser
        self.conditioner = model.conditioner
        self.first_stage = model.first_stage

    @property
    def device(self) -> torch.device:
        """Where the model is, and the images are made."""
        return next(self.denoiser.parameters()).device

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
        shape, schedule = self.latent_shape(size), self.denoiser.schedule
        images = _stacked([request.image for request in requests], (3, *size), "a picture", self.device)
        masks = _stacked([request.mask for request in requests], (1, *size), "a mask", self.device)
        if masks is not None and images is None:
            raise UserError("a mask says what of a picture is painted anew: give the picture too (init_image)")
        fields, inputs, negative = self._conditions(requests, self._shown(images, masks, (len(requests), 3, *size)))

        times = settings.times(schedule)
        _scale(settings)
        self.denoiser.prepare(times)
        settings.guidance.check(self.denoiser, self.first_stage)
        denoise = settings.guidance(self.denoiser, inputs, negative, fields)
        noise = ImageNoise([request.seed for request in requests], self.device)
        eps = noise(shape)
        z = start(eps, times, schedule)
        if images is not None:
            known = self.first_stage.encode(images)
            begun = noised(known, eps, times[0], schedule)
            z = z if settings.strength == 1.0 else begun
            if masks is not None and not self.conditioner.sees_mask:
                mask = latent_mask(masks, self.first_stage.factor)
                z, denoise = begun.lerp(z, mask), keeping(denoise, known, mask, schedule)
        z = settings.sampler(denoise, z, steps_of(times, schedule, len(z)), noise, on_step)
        made = (self.first_stage.decode(z).float() * 0.5 + 0.5).clamp(0.0, 1.0)
        if images is not None and masks is not None:
            made = (images * 0.5 + 0.5).lerp(made, masks)  # what is kept, is kept pixel for pixel
        return made

    def batches(
        self,
        requests: Sequence[Request],
        size: tuple[int, int],
        settings: SamplingSettings,
        batch_size: int | None = 16,
        on_step: Callable[[int], object] = lambda images: None,
    ) -> Iterator[Tensor]:
        """Images [b, 3, H, W] in [0, 1] on the CPU, in the order of the requests, at most `batch_size` at a time.

        None begins with BATCH_SIZES. A batch that does not fit into memory is halved, with a note, and so are those
        after it. `on_step` is told, after each step, how many images took it. UserError where one image is too many.
        """
        most = BATCH_SIZES.get(self.device.type, 16) if batch_size is None else batch_size
        if most < 1:
            raise UserError(f"batch_size={batch_size}: expected 1 or more, or auto")
        first, told = 0, 0  # told: the steps that a failed attempt told already
        while first < len(requests):
            part = requests[first : first + most]
            steps = _Steps(len(part), on_step, told)
            images = _unless_out_of_memory(lambda p=part, s=steps: self.batch(p, size, settings, s).cpu())  # type: ignore[misc]
            if images is not None:
                first, told = first + len(part), 0
                yield images
                continue
            if len(part) == 1:
                raise UserError(
                    f"size={list(size)}: one image does not fit into the memory of {self.device}; give a smaller size"
                )
            most, told = (len(part) + 1) // 2, max(told, steps.told)
            log.warning("out of memory with %d images at once: going on with batch_size=%d", len(part), most)

    def generate(
        self,
        requests: Sequence[Request],
        size: tuple[int, int],
        settings: SamplingSettings,
        batch_size: int | None = 16,
        on_step: Callable[[int], object] = lambda images: None,
    ) -> Iterator[Tensor]:
        """Images [3, H, W] in [0, 1] in the order of the requests, see `batches`."""
        for images in self.batches(requests, size, settings, batch_size, on_step):
            yield from images

    def _conditions(
        self, requests: Sequence[Request], shown: Mapping[str, Tensor]
    ) -> tuple[dict[str, list[str]], dict[str, Tensor], dict[str, Tensor]]:
        """The texts, what the network gets of them, and of the negative ones; both see the same pictures."""
        names = requests[0].fields.keys()
        given = {name: [request.fields[name] for request in requests] for name in names}
        away = {name: [request.negative.get(name, "") for request in requests] for name in names}
        inputs: Fields = {**given, **shown}
        negative: Fields = {**away, **shown}
        return given, self.conditioner(inputs, None).inputs(), self.conditioner(negative, None).inputs()

    def _shown(self, images: Tensor | None, masks: Tensor | None, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The pictures a conditioner may ask for; for an inpainting model all is to be painted where none is given."""
        if self.conditioner.sees_mask and (images is None or masks is None):
            return {
                "image": torch.zeros(shape, device=self.device),
                "mask": torch.ones(shape, device=self.device)[:, :1],
            }
        return {name: tensor for name, tensor in (("image", images), ("mask", masks)) if tensor is not None}


def _scale(settings: SamplingSettings) -> None:
    """Shim: sets the scale of the innermost guidance, until a guidance takes the scale in its call."""
    guidance: object = settings.guidance
    while guidance is not None and settings.guidance_scale is not None:
        if hasattr(guidance, "scale"):
            guidance.scale = settings.guidance_scale
        guidance = getattr(guidance, "guidance", None)


class _Steps:
    """Tells how many images took each step of a batch; of the first ones, as many as were told before are left out."""

    def __init__(self, images: int, on_step: Callable[[int], object], before: int) -> None:
        self.images = images
        self.on_step = on_step
        self.before = before
        self.told = 0

    def __call__(self, done: int) -> None:
        self.told += self.images
        new = min(self.images, self.told - self.before)
        if new > 0:
            self.on_step(new)


def _stacked(given: Sequence[Tensor | None], shape: tuple[int, ...], what: str, device: torch.device) -> Tensor | None:
    """The tensors [B, *shape] on the device, or None for none; UserError where some lack or have another shape."""
    there = [tensor for tensor in given if tensor is not None]
    if not there:
        return None
    if len(there) != len(given):
        raise UserError(f"{len(there)} of a batch's {len(given)} requests have {what}: make the others apart")
    for tensor in there:
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{what} of shape {list(tensor.shape)} for an image of {list(shape)}: bring it to that size"
            )
    return torch.stack(there).to(device)


def _unless_out_of_memory(make: Callable[[], Tensor]) -> Tensor | None:
    """What `make` gives; None, with the memory it took given back, where there is too little."""
    try:
        return make()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def save_image(image: Tensor, path: Path, facts: Mapping[str, object]) -> None:
    """Writes an image [3, H, W] in [0, 1] as PNG, with `facts` as JSON in its text chunk `ldm`."""
    pixels = (image.permute(1, 2, 0) * 255.0).round().to(torch.uint8).cpu().numpy()
    text = PngInfo()
    text.add_text("ldm", json.dumps(dict(facts)))
    with write_atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=text)


def open_image(path: Path) -> Tensor:
    """A picture [3, H, W] in [0, 1] as `save_image` wrote it."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 255.0
