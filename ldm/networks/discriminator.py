"""The discriminator that the first stage is trained against."""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Logits [B, 1, h, w], one per overlapping patch of the image: high where it looks real.

    Each of `layers` convolutions of stride 2 halves the image; with 3 layers a logit sees 70x70 pixels.
    Source: Isola et al. 2017 (PatchGAN), in the layout of taming-transformers' `NLayerDiscriminator`.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        width = channels
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            ins, width = width, channels * min(2**i, 8)
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(ins, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, padding=1))
        self.apply(_init)

    def forward(self, images: Tensor) -> Tensor:
        """[B, in_channels, H, W] in [-1, 1] to [B, 1, h, w]."""
        logits: Tensor = self.layers(images)
        return logits


def _init(module: nn.Module) -> None:
    """Convolutions from N(0, 0.02), batch norms' scale from N(1, 0.02), as the GAN literature does."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
