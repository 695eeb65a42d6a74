"""The denoising loss: draw a time and noise for each sample, compare the network's output with its target."""

from typing import NamedTuple

from torch import Tensor, nn

from ldm.diffusion.criterion import Criterion
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.time_density import TimeDensity, stratified
from ldm.diffusion.weighting import Weighting
from ldm.errors import UserError
from ldm.randomness import fold, normal, uniform


class DenoisingLoss(NamedTuple):
    """The weighted loss (a scalar) and, per sample [B], the unweighted error and the time it was drawn at."""

    loss: Tensor
    errors: Tensor
    t: Tensor


class NoiseKeys(NamedTuple):
    """Where the samples of a batch get their randomness from, and where they stand in the global batch."""

    rng_keys: Tensor  # [B] int64, the address of each sample's time and noise
    positions: Tensor  # [B] int64, from 0
    global_batch: int


class DiffusionLoss(nn.Module):
    """Weighted error of the network's output (Ho et al. 2020, eq. 14, generalised).

    Args:
        weighting: weight of each noise level.
        time_density: how often each noise level is drawn.
        criterion: the error of a number; the weightings' formulas are for squared ones.
        stratified: draw the times of a global batch from strata of equal probability, one for each sample
            (as Kingma et al. 2021 do): the same density, less variance of the loss.
        offset_noise: strength of noise that is constant over a channel (0 is off; SDXL used 0.05), which
            lets the mean brightness be learned (Guttenberg 2023).
        input_perturbation: strength of more noise in the network's input that its target leaves out (0 is off;
            Ning et al. 2023 use 0.1), so that a sampler's errors are no surprise.
    """

    def __init__(
        self,
        weighting: Weighting,
        time_density: TimeDensity,
        criterion: Criterion,
        stratified: bool = False,
        offset_noise: float = 0.0,
        input_perturbation: float = 0.0,
    ) -> None:
        super().__init__()
        if offset_noise < 0 or input_perturbation < 0:
            raise UserError(
                f"offset_noise={offset_noise}, input_perturbation={input_perturbation}: expected 0 (off) or more"
            )
        self.weighting = weighting
        self.time_density = time_density
        self.criterion = criterion
        self.stratified = stratified
        self.offset_noise = offset_noise
        self.input_perturbation = input_perturbation

    def forward(self, denoiser: Denoiser, x0: Tensor, inputs: dict[str, Tensor], draws: NoiseKeys) -> DenoisingLoss:
        """The loss at x0 [B, C, h, w]; each sample's time and noise come from its key."""
        t = self.times(denoiser, draws)
        eps = self.noise(x0, draws.rng_keys)
        level = denoiser.schedule(t)
        shaped = level.like(x0)
        z = shaped.alpha * x0 + shaped.sigma * self.perturbed(eps, draws.rng_keys)
        target = denoiser.prediction.target(x0, eps, shaped)
        difference = denoiser.output(z, t, level, inputs) - target.float()
        errors = self.criterion(difference).flatten(1).mean(1)
        losses = self.weighting(errors, level, denoiser.prediction)
        return DenoisingLoss(losses.mean(), errors.detach(), t)

    def times(self, denoiser: Denoiser, draws: NoiseKeys) -> Tensor:
        """A time for each sample [B], float64."""
        u = uniform(fold(draws.rng_keys, "time"))
        if self.stratified:
            u = stratified(u, draws.positions, draws.global_batch)
        return self.time_density(u, denoiser.schedule)

    def noise(self, x0: Tensor, rng_keys: Tensor) -> Tensor:
        """Noise shaped like x0 [B, C, h, w], with the offset of each channel."""
        eps = normal(fold(rng_keys, "noise"), tuple(x0.shape[1:])).to(x0.dtype)
        if self.offset_noise:
            eps = eps + self.offset_noise * normal(fold(rng_keys, "offset"), (x0.shape[1], 1, 1)).to(x0.dtype)
        return eps

    def perturbed(self, eps: Tensor, rng_keys: Tensor) -> Tensor:
        """The noise that the network's input has, where its target has eps (Ning et al. 2023)."""
        if not self.input_perturbation:
            return eps
        return eps + self.input_perturbation * normal(fold(rng_keys, "perturbation"), tuple(eps.shape[1:])).to(
            eps.dtype
        )
