"""Auxiliary losses: terms in addition to the denoising loss, which may use features inside of the network."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, NamedTuple

from torch import Tensor, nn

from ldm.errors import UserError, nearest


class AuxiliaryInputs(NamedTuple):
    """A batch as an auxiliary loss sees it; `x0_prediction` carries the network's gradient."""

    images: Tensor | None
    """[B, 3, H, W] in [-1, 1]; None where training runs on cached latents."""
    x0: Tensor
    """[B, C, h, w], normalised latents."""
    z: Tensor
    """[B, C, h, w], the network's noisy latents."""
    t: Tensor
    """[B], float64, in the schedule's unit."""
    cond: Mapping[str, Tensor]
    """tokens, mask, vector, concat, as far as the conditioner gives them."""
    eps: Tensor
    """[B, C, h, w], the noise of the target."""
    x0_prediction: Tensor
    """[B, C, h, w], the network's estimate of x0."""


class AuxiliaryLoss(nn.Module, ABC):
    """A term `weight * mean(forward(...))` of the training loss; its parameters (projectors) train with the model.

    Args:
        weight: of the term in the training loss, 0 or more. The validation loss leaves the term out.
        taps: dotted names of the network's submodules whose outputs `forward` gets, e.g. "middle.0"; each returns a
            tensor. Where a submodule is called several times, the last output counts.
    """

    needs_images = False
    """Whether it looks at the pictures, which cached latents do not have."""

    def __init__(self, weight: float, taps: Sequence[str] = ()) -> None:
        super().__init__()
        if not (isfinite(weight) and weight >= 0):
            raise UserError(f"weight={weight} of {type(self).__name__}: expected a finite number, 0 or more")
        self.weight = weight
        self.taps = tuple(taps)

    @abstractmethod
    def forward(self, features: Mapping[str, Tensor], batch: AuxiliaryInputs) -> Tensor:
        """The loss of each sample [B]; `features` are the taps' outputs by name."""

    def mean(self, name: str, features: Mapping[str, Tensor], batch: AuxiliaryInputs) -> Tensor:
        """The mean over the batch, a scalar; UserErrors name the term by its `name` in the configuration."""
        if self.needs_images and batch.images is None:
            raise UserError(f"auxiliary.{name} needs the pictures, which cached latents do not have; give latents=null")
        losses: Tensor = self({tap: features[tap] for tap in self.taps}, batch)
        if losses.shape != batch.t.shape:
            raise UserError(f"auxiliary.{name} returned {list(losses.shape)}: expected one loss for each sample [B]")
        return losses.float().mean()


def check_taps(network: nn.Module, taps: Iterable[str]) -> None:
    """Raise UserError for a tap that the network does not have, and for taps in a compiled network."""
    modules = dict(network.named_modules())
    for tap in taps:
        if tap not in modules:
            raise UserError(f"taps: {type(network).__name__} has no submodule {tap!r}; {nearest(tap, modules)}")
        if any(module._compiled_call_impl is not None for module in modules.values()):
            raise UserError(
                f"taps: {tap!r} is inside a network compiled by torch.compile, which skips hooks that come after "
                "compilation; give compile=false, or an auxiliary loss without taps"
            )


@contextmanager
def tapped(network: nn.Module, taps: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of submodules by name, filled while the network runs inside the `with` block.

    Raises UserError at the block's end where a submodule did not run, or did not return a tensor.
    """
    features: dict[str, Tensor] = {}
    taps = list(dict.fromkeys(taps))

    def keep(tap: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            features[tap] = output

        return hook

    hooks = [network.get_submodule(tap).register_forward_hook(keep(tap)) for tap in taps]
    try:
        yield features
    finally:
        for handle in hooks:
            handle.remove()
    for tap in taps:
        if not isinstance(features.get(tap), Tensor):
            outcome = f"returned a {type(features[tap]).__name__}" if tap in features else "did not run"
            raise UserError(f"taps: the submodule {tap!r} {outcome}; tap one that returns a tensor")
