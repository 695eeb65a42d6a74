"""The first stage's training: an autoencoder and, where the loss has one, its discriminator, in turn."""

from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from ldm.data.loading.batch import Batch
from ldm.data.loading.datamodule import ShardDataModule
from ldm.errors import UserError
from ldm.evaluation.grids import paired_grid
from ldm.evaluation.reconstruction import psnr
from ldm.first_stage.autoencoder import FirstStage
from ldm.first_stage.loss import FirstStageLoss
from ldm.randomness import fold, normal
from ldm.training.module import MakeLRSchedule, MakeOptimizer, Preview, TrainingModule


class FirstStageModule(TrainingModule):
    """Trains a first stage (Rombach et al. 2022, section 3.1; the adversarial part as in Esser et al. 2021).

    Optimisation is manual, since there may be two optimizers. Only the autoencoder's step counts as a
    step: `trainer.global_step`, `max_steps` and the discriminator's start are in autoencoder steps.
    """

    kind = "first_stage"
    exported = "first_stage"
    objective = "val/psnr"

    def __init__(
        self,
        first_stage: FirstStage,
        loss: FirstStageLoss,
        optimizer: MakeOptimizer,
        lr_schedule: MakeLRSchedule | None = None,
        gradient_clip: float | None = None,
        statistics_images: int = 2048,
        seed: int = 0,
    ) -> None:
        """Takes finished parts; `statistics_images` is how many give the latent mean and std at the end."""
        super().__init__(seed)
        self.automatic_optimization = False
        self.first_stage = first_stage
        self.loss = loss
        self.make_optimizer = optimizer
        self.make_lr_schedule = lr_schedule
        self.gradient_clip = gradient_clip
        self.statistics_images = statistics_images

    @property
    def unused_parameters(self) -> bool:  # type: ignore[override]
        """Whether there is a discriminator: each of the two steps leaves the other's parameters alone."""
        return self.loss.discriminator is not None

    def compiled_networks(self) -> list[nn.Module]:
        return [self.first_stage.encoder, self.first_stage.decoder]

    def setup(self, stage: str) -> None:
        """Refuses what would fail later: a size that does not divide, Lightning's own accumulation."""
        super().setup(stage)
        self.check_data(self.first_stage, None)
        if self.trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches}: the first stage "
                "trains with 1; use a smaller data.global_batch or more devices"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers = cast(list[LightningOptimizer], self.optimizers(use_pl_optimizer=True))
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        step = self.trainer.global_step
        reconstruction = self.first_stage(batch.images, self._noise(batch.images, batch.rng_keys))

        loss, logs = self.loss.generator(batch.images, reconstruction, step, self.first_stage)
        self._step(optimizers[0], loss, self.first_stage)
        if len(optimizers) > 1 and self.loss.adversarial_at(step):
            fake = reconstruction.images.detach()
            loss, discriminator_logs = self.loss.discriminator_loss(batch.images, fake, step)
            _uncounted(optimizers[1])
            self._step(optimizers[1], loss, cast(nn.Module, self.loss.discriminator))
            logs |= discriminator_logs
        for schedule in self._schedules():
            schedule.step()
        self.log_train(logs, len(batch.images))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images = self.first_stage.decode(self.first_stage.encode(batch.images))
        value = psnr(images.float() / 2 + 0.5, batch.images / 2 + 0.5).mean()
        self.log("val/psnr", value, batch_size=len(images), sync_dist=True, prog_bar=True)

    @torch.inference_mode()
    def draw_preview(self, path: Path, batch: Batch, preview: Preview) -> bool:
        """Draws the batch's pictures above what the first stage makes of them (of its mean, without noise)."""
        images = batch.images.to(self.device)  # [n, 3, H, W]
        decoded = self.first_stage.decode(self.first_stage.encode(images)).float()
        paired_grid(images / 2 + 0.5, (decoded / 2 + 0.5).clamp(0, 1), path)
        return True

    def configure_optimizers(self) -> Any:
        own = self.configure_with(self.make_optimizer, self.make_lr_schedule, self.first_stage.named_parameters())
        if self.loss.discriminator is None:
            return own
        parameters = self.loss.discriminator.named_parameters()
        return [own, self.configure_with(self.make_optimizer, self.make_lr_schedule, parameters)]

    @torch.no_grad()
    def finalize(self, datamodule: ShardDataModule) -> dict[str, Any]:
        """Measures the latents' mean and std per channel and the PSNR, with the weights as they are now."""
        self.eval()
        self.first_stage.set_statistics(0.0, 1.0)
        total, squares, values = torch.zeros(()), torch.zeros(()), 0
        ratios: list[Tensor] = []
        batches = datamodule.train_batches()
        count = min(len(batches), -(-self.statistics_images // datamodule.global_batch))
        for batch in (batches[i] for i in range(count)):
            images, rng_keys = batch.images.to(self.device), batch.rng_keys.to(self.device)
            z = self.first_stage.encode(images, self._noise(images, rng_keys))
            total = total + z.double().sum((0, 2, 3)).cpu()
            squares = squares + z.double().square().sum((0, 2, 3)).cpu()
            values += z.numel() // z.shape[1]
            decoded = self.first_stage.decode(self.first_stage.encode(images)).float()
            ratios.append(psnr(decoded.clamp(-1, 1) / 2 + 0.5, images / 2 + 0.5).cpu())
        mean = total / values
        std = (squares / values - mean.square()).clamp(min=1e-12).sqrt()
        self.first_stage.set_statistics(mean, std)
        return {
            "latent_mean": mean.tolist(),
            "latent_std": std.tolist(),
            "factor": self.first_stage.factor,
            "psnr_db": float(torch.cat(ratios).mean()),
            "statistics_images": sum(len(part) for part in ratios),
        }

    def _noise(self, images: Tensor, rng_keys: Tensor) -> Tensor:
        height, width = images.shape[2:]
        factor, channels = self.first_stage.factor, self.first_stage.latent_channels
        return normal(fold(rng_keys, "posterior"), (channels, height // factor, width // factor))

    def _step(self, optimizer: LightningOptimizer, loss: Tensor, part: nn.Module) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.gradient_clip is not None:
            nn.utils.clip_grad_norm_(part.parameters(), self.gradient_clip)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def _schedules(self) -> list[Any]:
        schedules = self.lr_schedulers()
        if schedules is None:
            return []
        return schedules if isinstance(schedules, list) else [schedules]


def _uncounted(optimizer: LightningOptimizer) -> None:
    """Lets this optimizer's next step not count in `trainer.global_step` (pytorch-lightning#17958)."""
    optimizer._on_before_step = lambda: None
    optimizer._on_after_step = lambda: None
