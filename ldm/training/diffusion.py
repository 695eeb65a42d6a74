"""The second stage: conditional diffusion in the latents of a frozen first stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.loading.batch import Batch
from ldm.diffusion.loss import DenoisingLoss, DiffusionLoss, NoiseKeys
from ldm.evaluation.grids import labelled_grid
from ldm.generation import Generator, Request
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.module import MakeLRSchedule, MakeOptimizer, Preview, TrainingModule


class DiffusionModule(TrainingModule):
    """Trains the denoiser, and conditioner and loss where they learn (Rombach et al. 2022, eq. 3)."""

    def __init__(
        self,
        latent_diffusion: LatentDiffusion,
        loss: DiffusionLoss,
        optimizer: MakeOptimizer,
        lr_schedule: MakeLRSchedule | None = None,
        seed: int = 0,
    ) -> None:
        """Takes finished parts; `optimizer` makes an optimizer from parameters, `lr_schedule` from an optimizer."""
        super().__init__(seed)
        self.latent_diffusion = latent_diffusion
        self.loss = loss
        self.make_optimizer = optimizer
        self.make_lr_schedule = lr_schedule

    def compiled_networks(self) -> list[nn.Module]:
        return [self.latent_diffusion.denoiser.network]

    def setup(self, stage: str) -> None:
        """Refuses sizes that first stage or network can't take, other latents and missing taps before anything runs."""
        super().setup(stage)
        first_stage, denoiser = self.latent_diffusion.first_stage, self.latent_diffusion.denoiser
        self.check_data(first_stage, first_stage.fingerprint())
        for height, width in getattr(getattr(self.trainer, "datamodule", None), "sizes", ()):
            denoiser.network.check_size(height // first_stage.factor, width // first_stage.factor)
        self.loss.check(denoiser)

    def denoising_loss(self, batch: Batch, training: bool) -> DenoisingLoss:
        """The loss of a batch, in training with conditioning dropout and auxiliary losses; all that is random comes
        from the batch's keys."""
        model = self.latent_diffusion
        cached = batch.moments
        z0 = (
            model.latents(batch.images, batch.rng_keys)
            if cached is None
            else model.sample_from_moments(cached, batch.rng_keys)
        )
        condition = model.conditioner(condition_fields(batch), batch.rng_keys if training else None)
        noise_keys = NoiseKeys(batch.rng_keys, batch.positions, batch.global_batch)
        images = batch.images if cached is None else None
        result: DenoisingLoss = self.loss(model.denoiser, z0, condition.inputs(), noise_keys, images, training)
        return result

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        result = self.denoising_loss(batch, training=True)
        self.log_train({"loss": result.loss.detach(), **result.auxiliary}, len(batch.images))
        return result.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        result = self.denoising_loss(batch, training=False)
        self.log("val/loss", result.loss, batch_size=len(batch.images), sync_dist=True, prog_bar=True)

    @torch.inference_mode()
    def draw_preview(self, path: Path, batch: Batch, preview: Preview) -> bool:
        """Draws labelled samples of the preview's prompts, or of the batch's texts."""
        generator = Generator(self.latent_diffusion)
        requests = _preview_requests(batch, preview)
        size = (batch.images.shape[2], batch.images.shape[3])
        images = list(generator.generate(requests, size, preview.sampling))
        labelled_grid(images, [" / ".join(request.fields.values()) for request in requests], path)
        return True

    def configure_optimizers(self) -> Any:
        return self.configure_with(self.make_optimizer, self.make_lr_schedule, self.named_parameters())


def _preview_requests(batch: Batch, preview: Preview) -> list[Request]:
    if preview.prompts is not None:
        texts = [preview.prompts[i % len(preview.prompts)] for i in range(preview.n)]
        return [Request({"caption": text}, preview.seed + i) for i, text in enumerate(texts)]
    fields = {name: values for name, values in batch.fields.items() if isinstance(values, list)}
    rows = zip(*fields.values(), strict=True)
    return [Request(dict(zip(fields, row, strict=True)), preview.seed + i) for i, row in enumerate(rows)]


def condition_fields(batch: Batch) -> dict[str, Sequence[str] | Tensor]:
    """What a conditioner may ask of a batch: its texts, `original_size`, `crop`, `target_size` (pixels), and `image`.

    There is no `image` where latents stand for the pictures.
    """
    size = batch.crop.new_tensor([batch.images.shape[2:]]).expand_as(batch.crop)
    sizes = {"original_size": batch.original_size, "crop": batch.crop, "target_size": size}
    picture = {"image": batch.images} if batch.moments is None else {}
    return {**batch.fields, **sizes, **picture}
