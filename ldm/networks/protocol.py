"""The interface of a denoising network: what a custom network needs to be trained and sampled from."""

from typing import Protocol

from torch import Tensor, nn

from ldm.errors import UserError

ATTRIBUTES = {
    "in_channels": "channels of z and concat together",
    "out_channels": "channels of the output, the same as those of z",
    "context_dim": "width of the tokens, None for a network without them",
    "vector_dim": "width of the vector, None for a network without it",
    "check_size": "check_size(height, width), which raises UserError for latents of a size that does not fit",
    "forward": "forward(z, t, tokens=None, mask=None, vector=None, concat=None)",
}


class DenoisingNetwork(Protocol):
    """A network that predicts [B, out_channels, h, w] from noisy latents, their time and a condition.

    `UNet` is one. A custom network is an nn.Module with these attributes; nothing asks for its class.
    """

    in_channels: int
    """Channels of z and `concat` together."""
    out_channels: int
    """Channels of the prediction, the same as those of z."""
    context_dim: int | None
    """Width of the tokens; None: no tokens."""
    vector_dim: int | None
    """Width of the vector; None: no vector."""

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError where latents of height x width do not fit, e.g. into patches."""

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        """The prediction [B, out_channels, h, w].

        z [B, C, h, w]; t [B] in [0, 1000], float32; tokens [B, L, context_dim]; mask [B, L] bool, True = attend;
        vector [B, vector_dim]; concat [B, in_channels - C, h, w]. Arguments that the conditioner does not give are
        left out.
        """


def check_network(network: object) -> None:
    """Raise UserError for an object that is not a `DenoisingNetwork`; it names the first missing attribute."""
    for name, meaning in ATTRIBUTES.items():
        value = getattr(network, name, None)
        unimplemented = getattr(value, "__func__", None) is nn.Module.forward  # the one that only raises
        if not hasattr(network, name) or unimplemented:
            raise UserError(f"network: {type(network).__name__} has no {name} ({meaning}); see docs/extend.md")
