"""Our weights put into a peer's module, and what comes out compared."""

from collections.abc import Sequence

from torch import Tensor, nn

from ldm.interop.names import WeightMapping
from ldm.networks.blocks import sinusoidal_embedding

TOLERANCE = 1e-10  # ||difference|| / ||value|| in float64; up to 2.2e-14 is measured


def copy_weights(ours: nn.Module, peer: nn.Module, pieces: Sequence[WeightMapping]) -> None:
    """Loads our weights into the peer, all of them."""
    state = {name: p.detach() for name, p in ours.named_parameters()}
    peer.load_state_dict({piece.theirs: piece.of(state) for piece in pieces}, strict=True)


def share_weights(ours: nn.Module, peer: nn.Module, pieces: Sequence[WeightMapping]) -> None:
    """Gives a peer that was built on the meta device our weights themselves, so that large ones exist once."""
    state = {name: p.detach() for name, p in ours.named_parameters()}
    peer.load_state_dict({piece.theirs: piece.of(state) for piece in pieces}, strict=True, assign=True)


def gradients_of(peer: nn.Module, ours: nn.Module, pieces: Sequence[WeightMapping]) -> dict[str, Tensor]:
    """The peer's gradients by our names and in our shapes."""
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    theirs = dict(peer.named_parameters())
    found: dict[str, Tensor] = {}
    for piece in pieces:
        gradient = theirs[piece.theirs].grad
        assert gradient is not None, piece.theirs
        found |= piece.back(gradient, shapes)
    return found


def worst_gradient(ours: nn.Module, wanted: dict[str, Tensor], left_out: str = "\0") -> tuple[float, str]:
    """The largest relative difference of a parameter's gradient, and whose it is."""
    parameters = {name: p.grad for name, p in ours.named_parameters() if not name.endswith(left_out)}
    assert set(parameters) <= set(wanted)
    return max((relative(g, wanted[name]) if g is not None else float("inf"), name) for name, g in parameters.items())


def relative(given: Tensor, wanted: Tensor) -> float:
    """||given - wanted|| / ||wanted||."""
    wanted = wanted.detach().reshape(given.shape)
    return float((given.detach() - wanted).norm() / wanted.norm())


def spread(module: nn.Module) -> None:
    """Random weights under which every parameter matters (fresh UNets begin with zeros)."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


class OurSinusoids(nn.Module):
    """Our time embedding for a peer, instead of its `time_proj`.

    Both sides compute the sinusoids in float32 whatever the type of the rest, so their last digits differ.
    `test_unet.py` compares the sinusoids themselves.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, t: Tensor) -> Tensor:
        return sinusoidal_embedding(t, self.channels)
