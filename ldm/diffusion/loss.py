"""The denoising loss: draw a time and noise for each sample, compare the network's output with its target."""

from collections.abc import Mapping
from typing import NamedTuple, cast

from torch import Tensor, nn

from ldm.diffusion.auxiliary import AuxiliaryInputs, AuxiliaryLoss, check_taps, tapped
from ldm.diffusion.criterion import Criterion
from ldm.diffusion.denoiser import Cond, Denoiser
from ldm.diffusion.time_density import TimeDensity, stratified
from ldm.diffusion.weighting import Weighting
from ldm.errors import UserError
from ldm.randomness import fold, normal, uniform


class DenoisingLoss(NamedTuple):
    """The loss to minimise, and its parts."""

    loss: Tensor
    """Scalar: the weighted denoising loss plus the weighted auxiliary losses."""
    errors: Tensor
    """[B], the unweighted error of each sample, detached."""
    t: Tensor
    """[B], the time of each sample."""
    auxiliary: dict[str, Tensor]
    """The auxiliary losses by name, unweighted scalars, detached."""


class NoiseKeys(NamedTuple):
    """The addresses of a batch's randomness, and the samples' positions in the global batch."""

    rng_keys: Tensor  # [B] int64, the address of each sample's time and noise
    positions: Tensor  # [B] int64, from 0
    global_batch: int


class DiffusionLoss(nn.Module):
    """Weighted error of the network's output (Ho et al. 2020, eq. 14, generalised).

    Args:
        weighting: weight of each noise level.
        time_density: how often each noise level is drawn.
        criterion: the error of each value; the weightings' formulas are for squared ones.
        stratified: draw the times of a global batch from strata of equal probability, one for each sample
            (as Kingma et al. 2021 do): the same density, less variance of the loss.
        offset_noise: strength of noise that is constant over a channel (0 is off; SDXL used 0.05), which
            lets the mean brightness be learned (Guttenberg 2023).
        input_perturbation: strength of additional noise in the network's input that is not in its target (0 is off;
            Ning et al. 2023 use 0.1), against a sampler's accumulated errors.
        auxiliary: further losses by name; the name is what they are logged under.
    """

    def __init__(
        self,
        weighting: Weighting,
        time_density: TimeDensity,
        criterion: Criterion,
        stratified: bool = False,
        offset_noise: float = 0.0,
        input_perturbation: float = 0.0,
        auxiliary: Mapping[str, AuxiliaryLoss] | None = None,
    ) -> None:
        super().__init__()
        if offset_noise < 0 or input_perturbation < 0:
            raise UserError(
                f"offset_noise={offset_noise}, input_perturbation={input_perturbation}: expected 0 (off) or more"
            )
        for name in auxiliary or ():
            if not name.isidentifier() or name == "loss" or hasattr(nn.ModuleDict, name):
                raise UserError(f"auxiliary.{name}: expected a plain name that is not taken, e.g. auxiliary.alignment")
        self.weighting = weighting
        self.time_density = time_density
        self.criterion = criterion
        self.stratified = stratified
        self.offset_noise = offset_noise
        self.input_perturbation = input_perturbation
        self.auxiliary = nn.ModuleDict(auxiliary)

    def check(self, denoiser: Denoiser) -> None:
        """Raise UserError where an auxiliary loss taps what the denoiser's network does not have."""
        for term in self._terms().values():
            check_taps(denoiser.network, term.taps)

    def forward(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        cond: Cond,
        noise_keys: NoiseKeys,
        images: Tensor | None = None,
        auxiliary: bool = True,
    ) -> DenoisingLoss:
        """The loss at x0 [B, C, h, w]; each sample's time and noise come from its key.

        `images` [B, 3, H, W] in [-1, 1] are for the auxiliary losses, which `auxiliary=False` leaves out.
        """
        rng_keys = noise_keys.rng_keys
        t = self.times(denoiser, noise_keys)
        eps = self.noise(x0, rng_keys)
        level = denoiser.schedule(t)
        shaped = level.like(x0)
        z = shaped.alpha * x0 + shaped.sigma * self.perturb(eps, rng_keys)
        terms = self._terms() if auxiliary else {}
        with tapped(denoiser.network, [tap for term in terms.values() for tap in term.taps]) as features:
            output = denoiser.output(z, t, shaped, cond)
        target = denoiser.prediction.target(x0, eps, shaped)
        errors = self.criterion(output - target.float()).flatten(1).mean(1)
        loss = self.weighting(errors, level, denoiser.prediction).mean()
        values = {}
        if terms:
            x0_prediction = denoiser.prediction.solve(z, output.to(z.dtype), shaped).x0
            batch = AuxiliaryInputs(images, x0, z, t, cond, eps, x0_prediction)
            for name, term in terms.items():
                value = term.mean(name, features, batch)
                loss = loss + term.weight * value
                values[name] = value.detach()
        return DenoisingLoss(loss, errors.detach(), t, values)

    def _terms(self) -> dict[str, AuxiliaryLoss]:
        return cast(dict[str, AuxiliaryLoss], dict(self.auxiliary))

    def times(self, denoiser: Denoiser, noise_keys: NoiseKeys) -> Tensor:
        """A time for each sample [B], float64."""
        u = uniform(fold(noise_keys.rng_keys, "time"))
        if self.stratified:
            u = stratified(u, noise_keys.positions, noise_keys.global_batch)
        return self.time_density(u, denoiser.schedule)

    def noise(self, x0: Tensor, rng_keys: Tensor) -> Tensor:
        """Noise shaped like x0 [B, C, h, w], with the offset of each channel."""
        eps = normal(fold(rng_keys, "noise"), tuple(x0.shape[1:])).to(x0.dtype)
        if self.offset_noise:
            eps = eps + self.offset_noise * normal(fold(rng_keys, "offset"), (x0.shape[1], 1, 1)).to(x0.dtype)
        return eps

    def perturb(self, eps: Tensor, rng_keys: Tensor) -> Tensor:
        """The noise in the network's input, where its target has eps (Ning et al. 2023)."""
        if not self.input_perturbation:
            return eps
        return eps + self.input_perturbation * normal(fold(rng_keys, "perturbation"), tuple(eps.shape[1:])).to(
            eps.dtype
        )
