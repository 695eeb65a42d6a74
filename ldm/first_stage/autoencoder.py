"""The first stage: encoder, regularizer, decoder and the statistics of its latents."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from ldm.checkpoint import fingerprint
from ldm.errors import UserError
from ldm.first_stage.regularizer import Regularizer, RegularizerOutput
from ldm.networks.autoencoder import Decoder, Encoder


class Reconstruction(NamedTuple):
    """A first stage's output in training."""

    images: Tensor  # [B, 3, H, W], in about [-1, 1]
    regularized: RegularizerOutput


class FirstStage(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to latents [B, C, H / factor, W / factor] and back.

    Args:
        encoder, regularizer, decoder: the three parts.
        latent_channels: C.
        quant_conv: whether there are 1x1 convolutions before the regularizer and before the decoder, as in LDM.
        latent_mean, latent_std: the statistics that `encode` normalises by, a number or one per channel.
            SD 1's scale factor 0.18215 is latent_std = 1 / 0.18215. They are buffers, so a checkpoint holds
            them, and they stay float32 when the weights are cast.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        regularizer: Regularizer,
        decoder: Decoder,
        latent_channels: int,
        quant_conv: bool = True,
        latent_mean: float | Sequence[float] = 0.0,
        latent_std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        features = regularizer.in_factor * latent_channels
        if encoder.factor != decoder.factor:
            raise UserError(
                f"the encoder divides the size by {encoder.factor}, the decoder multiplies by "
                f"{decoder.factor}; give both the same number of channel_mult entries"
            )
        if regularizer.channels not in (None, latent_channels):
            raise UserError(
                f"the regularizer has channels={regularizer.channels}, the first stage latent_channels="
                f"{latent_channels}; give both the same"
            )
        if not quant_conv and (encoder.out_channels, decoder.in_channels) != (features, latent_channels):
            raise UserError(
                f"without quant_conv the encoder needs out_channels={features} (it has "
                f"{encoder.out_channels}), the decoder in_channels={latent_channels} ({decoder.in_channels})"
            )
        self.latent_channels = latent_channels
        self.factor = encoder.factor
        self.encoder = encoder
        self.quant_conv = nn.Conv2d(encoder.out_channels, features, 1) if quant_conv else nn.Identity()
        self.regularizer = regularizer
        regularizer.initialise(self.quant_conv)
        self.post_quant_conv = nn.Conv2d(latent_channels, decoder.in_channels, 1) if quant_conv else nn.Identity()
        self.decoder = decoder
        self.register_buffer("latent_mean", torch.zeros(latent_channels, dtype=torch.float32))
        self.register_buffer("latent_std", torch.ones(latent_channels, dtype=torch.float32))
        self.set_statistics(latent_mean, latent_std)

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, where the adversarial weight is measured."""
        return self.decoder.conv_out.weight

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """The training path: images through all parts; noise [B, C, h, w] samples a KL posterior."""
        regularized: RegularizerOutput = self.regularizer(self._features(images), noise)
        return Reconstruction(self._images(regularized.sample), regularized)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents [B, C, h, w], in float32 at least, of images [B, 3, H, W] in [-1, 1].

        Without noise [B, C, h, w] a KL posterior gives its mean. Gradients and autocast are the caller's.
        """
        z = self.regularizer.sample(self._features(images), noise)
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def moments(self, images: Tensor) -> Tensor:
        """Mean and std [B, 2, C, h, w] of `encode`'s normalised latents: mean + std * noise."""
        mean, std = self.regularizer.posterior(self._features(images))
        scale = self.latent_std[:, None, None]
        return torch.stack([(mean - self.latent_mean[:, None, None]) / scale, std / scale], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, 3, H, W], in about [-1, 1] and not clamped, of normalised latents [B, C, h, w]."""
        # in float32 at least, as the statistics
        z = z * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        return self._images(self.regularizer.quantize(z))

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError where images of this size have no latents of whole size."""
        if height < 1 or width < 1 or height % self.factor or width % self.factor:
            near = [max(1, round(side / self.factor)) * self.factor for side in (height, width)]
            raise UserError(
                f"images of {height}x{width} do not divide by the first stage's factor {self.factor}; "
                f"the nearest size that does is {near[0]}x{near[1]}"
            )

    def set_statistics(self, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor) -> None:
        """Sets the mean and standard deviation of the raw latents, a number or one per channel."""
        for name, value, buffer in (("mean", mean, self.latent_mean), ("std", std, self.latent_std)):
            values = torch.as_tensor(value, dtype=torch.float32, device="cpu")
            if values.shape not in {(), (1,), buffer.shape}:
                raise UserError(
                    f"latent_{name} has {values.numel()} entries; give one number or {self.latent_channels}"
                )
            if not values.isfinite().all() or (name == "std" and not (values > 0).all()):
                raise UserError(f"latent_{name}={values.tolist()}: it has to be finite, and std above 0")
            buffer.copy_(values)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the weights and statistics; cached latents are recorded with them.

        A cast changes the weights, so take it before casting.
        """
        return fingerprint(self.state_dict())

    def _features(self, images: Tensor) -> Tensor:
        """The regularizer's input [B, in_factor * C, h, w]."""
        self.check_size(images.shape[-2], images.shape[-1])
        features: Tensor = self.quant_conv(self.encoder(images.to(self.last_layer.dtype)))
        return features

    def _images(self, z: Tensor) -> Tensor:
        """The decoder's images [B, 3, H, W] of raw latents [B, C, h, w]."""
        images: Tensor = self.decoder(self.post_quant_conv(z.to(self.last_layer.dtype)))
        return images

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as any module, but keeps the statistics in float32."""
        before = self.latent_mean, self.latent_std
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = [
            new if old.is_meta or new.is_meta else old.to(new.device)
            for old, new in zip(before, (self.latent_mean, self.latent_std), strict=True)
        ]
        self.latent_mean, self.latent_std = moved
        return self
