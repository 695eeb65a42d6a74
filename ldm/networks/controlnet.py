"""ControlNet: conditions a UNet on a picture by feature maps that are added to those of its way down."""

from copy import deepcopy
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.blocks import zero_
from ldm.networks.unet import UNet

HINT_widths = (16, 16, 32, 32, 96, 96, 256)  # of the convolutions over the picture; those that widen also halve it
HINT_factor = 8


class ControlNet(nn.Module):
    """The `control` of `UNet.forward`: feature maps that are added to those of its way down and of its middle.

    Args:
        unet: the UNet to control. Its way down and its middle are copied, weights included, and trained.
        hint_channels: channels of the control picture, 3.

    It starts at zero: each output passes a 1x1 convolution of zeros. For SD 1's UNet it has 361,279,120 parameters.

    Source: Zhang et al. 2023 (Adding Conditional Control to Text-to-Image Diffusion Models), section 3.
    """

    def __init__(self, unet: UNet, hint_channels: int = 3) -> None:
        super().__init__()
        self.trunk = deepcopy(unet)
        del self.trunk.up, self.trunk.norm_out, self.trunk.conv_out
        first = nn.Conv2d(hint_channels, HINT_widths[0], 3, padding=1)
        between = [nn.Conv2d(a, b, 3, stride=1 if a == b else 2, padding=1) for a, b in pairwise(HINT_widths)]
        last = nn.Conv2d(HINT_widths[-1], unet.model_channels, 3, padding=1)
        self.hint = nn.ModuleList([first, *between, last])
        channels = unet.skip_channels
        self.out = nn.ModuleList(nn.Conv2d(width, width, 1) for width in (*channels, channels[-1]))
        zero_(last)
        zero_(self.out)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        hint: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> list[Tensor]:
        """The feature maps [B, C_i, h_i, w_i], finest first, the middle's last.

        hint [B, hint_channels, 8 h, 8 w] in [0, 1]; the others as in `UNet.forward`. Raises UserError
        for a hint of another size.
        """
        wanted = (len(z), self.hint[0].in_channels, HINT_factor * z.shape[2], HINT_factor * z.shape[3])
        if hint.shape != wanted:
            raise UserError(f"a hint of shape {list(hint.shape)} for latents {list(z.shape)}: expected {list(wanted)}")
        for conv in self.hint[:-1]:
            hint = F.silu(conv(hint))
        skips, middle, _ = self.trunk.encode(z, t, tokens, mask, vector, concat, self.hint[-1](hint))
        return [out(h) for out, h in zip(self.out, [*skips, middle], strict=True)]
