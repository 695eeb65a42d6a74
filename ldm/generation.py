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
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling.grid import Grid
from ldm.sampling.guidance import Guidance
from ldm.sampling.image_to_image import add_noise_at, last_times
from ldm.sampling.inpainting import inpaint, latent_mask
from ldm.sampling.noise import ImageNoise
from ldm.sampling.sampler import OnStep, Sampler, start, steps_of

log = logging.getLogger(__name__)

BATCH_SIZES = {"cuda": 64, "cpu": 16}  # to start with, where the user gives none


@dataclass(frozen=True, eq=False)
class Request:
    """One image to make: its condition, its seed, and its negative prompts ("" where there is none).

    image  [3, H, W] in [-1, 1]: where sampling starts (image to image, inpainting); None: from noise alone
    mask   [1, H, W] in [0, 1], 1 where the image is repainted; None: everywhere
    """

    fields: Mapping[str, str]
    seed: int
    negative: Mapping[str, str] = field(default_factory=dict)
    image: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """How images are made: the sampler, the time grid, the number of steps, and the guidance.

    `guidance_scale` 1 is the condition alone. img2img `strength` in (0, 1]: the fraction of the steps that run; 1
    ignores the image.
    """

    sampler: Sampler
    grid: Grid
    guidance: Guidance
    steps: int
    guidance_scale: float
    strength: float = 1.0

    def times(self, schedule: Schedule) -> Tensor:
        """The times of the run, one more than the steps that run; UserError for steps or a strength out of range."""
        return last_times(self.grid(schedule, self.steps), self.strength)


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
        """The model's device, on which images are made."""
        return next(self.denoiser.parameters()).device

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of size (H, W) pixels; UserError for a size that does not fit."""
        self.first_stage.check_size(*size)
        factor = self.first_stage.factor
        height, width = size[0] // factor, size[1] // factor
        self.denoiser.network.check_size(height, width)
        return self.first_stage.latent_channels, height, width

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
        images = _stack([request.image for request in requests], (3, *size), "a picture", self.device)
        masks = _stack([request.mask for request in requests], (1, *size), "a mask", self.device)
        if masks is not None and images is None:
            raise UserError("a mask says which part of a picture is repainted: give the picture too (init_image)")
        pictures = self._pictures(images, masks, (len(requests), 3, *size))
        names = requests[0].fields.keys()
        prompts = {name: [request.fields[name] for request in requests] for name in names}
        negatives = {name: [request.negative.get(name, "") for request in requests] for name in names}
        cond = self.conditioner({**prompts, **pictures}, None).inputs()
        uncond = self.conditioner({**negatives, **pictures}, None).inputs()

        settings.guidance.check(self.denoiser, self.first_stage)
        denoise = settings.guidance(self.denoiser, cond, uncond, settings.guidance_scale, prompts)
        times = settings.times(schedule)
        noise = ImageNoise([request.seed for request in requests], self.device)
        eps = noise(shape)
        z = start(eps, times, schedule)
        if images is not None:
            known = self.first_stage.encode(images)
            z_known = add_noise_at(known, eps, times[0], schedule)
            z = z if settings.strength == 1.0 else z_known
            if masks is not None and not self.conditioner.sees_mask:
                mask = latent_mask(masks, self.first_stage.factor)
                z, denoise = z_known.lerp(z, mask), inpaint(denoise, known, mask, schedule)
        z = settings.sampler(denoise, z, steps_of(times, schedule, len(z), on_step), noise)
        result = (self.first_stage.decode(z).float() * 0.5 + 0.5).clamp(0.0, 1.0)
        if images is not None and masks is not None:
            result = (images * 0.5 + 0.5).lerp(result, masks)  # outside of the mask, the picture's own pixels
        return result

    def generate(
        self,
        requests: Sequence[Request],
        size: tuple[int, int],
        settings: SamplingSettings,
        batch_size: int | None = 16,
        on_step: Callable[[int], object] = lambda images: None,
    ) -> Iterator[Tensor]:
        """Images [3, H, W] in [0, 1] on the CPU, in the order of the requests; at most `batch_size` are made at a time.

        None starts with BATCH_SIZES. A batch that does not fit into memory is halved, with a note, and so are those
        after it. `on_step` gets, after each step, how many images took it. UserError where one image is too many.
        """
        limit = BATCH_SIZES.get(self.device.type, 16) if batch_size is None else batch_size
        if limit < 1:
            raise UserError(f"batch_size={batch_size}: expected 1 or more, or auto")
        first, reported = 0, 0  # reported: the steps that a failed attempt has counted already
        while first < len(requests):
            part = requests[first : first + limit]
            steps = _Steps(len(part), on_step, reported)
            images = _unless_out_of_memory(lambda p=part, s=steps: self.batch(p, size, settings, s).cpu())  # type: ignore[misc]
            if images is not None:
                first, reported = first + len(part), 0
                yield from images
                continue
            if len(part) == 1:
                raise UserError(
                    f"size={list(size)}: one image does not fit into the memory of {self.device}; give a smaller size"
                )
            limit, reported = (len(part) + 1) // 2, max(reported, steps.count)
            log.warning("out of memory with %d images at once: continuing with batch_size=%d", len(part), limit)

    def _pictures(self, images: Tensor | None, masks: Tensor | None, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The pictures a conditioner may ask for; an inpainting model without one repaints all of an empty picture."""
        if self.conditioner.sees_mask and (images is None or masks is None):
            empty = torch.zeros(shape, device=self.device)
            return {"image": empty, "mask": torch.ones_like(empty[:, :1])}
        return {name: tensor for name, tensor in (("image", images), ("mask", masks)) if tensor is not None}


class _Steps:
    """Reports how many images took each step of a batch, except for the first `reported` steps of images."""

    def __init__(self, images: int, on_step: Callable[[int], object], reported: int) -> None:
        self.images = images
        self.on_step = on_step
        self.reported = reported
        self.count = 0

    def __call__(self, done: int) -> None:
        self.count += self.images
        new = min(self.images, self.count - self.reported)
        if new > 0:
            self.on_step(new)


def _stack(tensors: Sequence[Tensor | None], shape: tuple[int, ...], what: str, device: torch.device) -> Tensor | None:
    """The tensors [B, *shape] on the device, or None where all are None; UserError for some, or for another shape."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    if len(present) != len(tensors):
        raise UserError(f"{len(present)} of a batch's {len(tensors)} requests have {what}: make the others separately")
    for tensor in present:
        if tuple(tensor.shape) != shape:
            raise UserError(f"{what} of shape {list(tensor.shape)} for an image of {list(shape)}: resize it")
    return torch.stack(present).to(device)


def _unless_out_of_memory(make: Callable[[], Tensor]) -> Tensor | None:
    """The result of `make`; None, with its memory released, where there is too little memory."""
    try:
        return make()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def save_image(image: Tensor, path: Path, facts: Mapping[str, object]) -> None:
    """Write an image [3, H, W] in [0, 1] as PNG, with `facts` as JSON in its text chunk `ldm`."""
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
