"""The attributes of a denoising network, for tests that write its forward themselves."""

from torch import nn


class ToyNetwork(nn.Module):
    """An unconditional network for latents of any number of channels and any size."""

    in_channels = out_channels = 4
    context_dim: int | None = None
    vector_dim: int | None = None

    def check_size(self, height: int, width: int) -> None:
        return
