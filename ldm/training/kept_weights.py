"""Weights in bfloat16 beside their float32 masters: what autocast would cast at every use is cast once a step."""

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import CLIPTextModel

from ldm.networks.autoencoder import Decoder, Encoder
from ldm.networks.unet import UNet

CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The modules whose weight and bias autocast casts, all others (norms, embeddings) stay in float32."""

NETWORKS = (UNet, Encoder, Decoder, CLIPTextModel)


def keep_weights(module: nn.Module) -> list["KeptWeights"]:
    """Gives every UNet, encoder, decoder and text encoder in a module its `KeptWeights`.

    Not those that are compiled: there the casts are part of the compiled code.
    """
    networks = [part for part in module.modules() if isinstance(part, NETWORKS)]
    return [KeptWeights(network) for network in networks if network._compiled_call_impl is None]


class KeptWeights:
    """Under autocast, a network computes with copies of its weights that are kept from step to step.

    The parameters stay the float32 masters: they are what the optimizer, the average, gradient clipping, DDP and
    checkpoints see, and gradients arrive in them. A copy is made anew in the next forward pass after its master was
    written to, as the master's version tells. The numbers are autocast's own, bit for bit. Without autocast nothing
    happens. Cost: 2 bytes for each weight; gain: all casts in one call and no fresh memory for them, none between the
    micro-steps of an accumulation, and none at all for what is frozen.
    """

    def __init__(self, network: nn.Module) -> None:
        self._slots = [
            (part, name)
            for part in network.modules()
            if isinstance(part, CAST)
            for name in ("weight", "bias")
            if part._parameters.get(name) is not None
        ]
        self._copies: list[Tensor] = []
        self._made_of: list[tuple[int, int]] = []  # each master's place and version
        self._masters: list[nn.Parameter] = []  # while the copies are in their place
        network.register_forward_pre_hook(self._put_in)
        network.register_forward_hook(self._take_out, always_call=True)
        _count_fused_writing()

    def _put_in(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        device = next(network.parameters()).device.type
        if not torch.is_autocast_enabled(device):
            return
        masters = [cast(nn.Parameter, part._parameters[name]) for part, name in self._slots]
        self._bring_up_to_date(masters, torch.get_autocast_dtype(device))
        self._masters = masters
        for i, (part, name) in enumerate(self._slots):
            part._parameters[name] = _InPlaceOf.apply(masters[i], self._copies[i])  # type: ignore[no-untyped-call]

    def _take_out(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._masters:
            for (part, name), master in zip(self._slots, self._masters, strict=True):
                part._parameters[name] = master
        self._masters = []

    def _bring_up_to_date(self, masters: list[nn.Parameter], dtype: torch.dtype) -> None:
        made_of = [(master.data_ptr(), master._version) for master in masters]
        with torch.inference_mode(False), torch.no_grad():
            if not self._copies or self._copies[0].dtype != dtype or self._copies[0].device != masters[0].device:
                self._copies = [torch.empty_like(master, dtype=dtype) for master in masters]
                self._made_of = []
            stale = [i for i, now in enumerate(made_of) if not self._made_of or self._made_of[i] != now]
            if stale:
                torch._foreach_copy_([self._copies[i] for i in stale], [masters[i].detach() for i in stale])
        self._made_of = made_of


@cache  # once in a process, for all optimizers
def _count_fused_writing() -> None:
    """From now on what any optimizer has written to is newer: fused ones leave tensors' versions as they are."""

    def count(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for group in optimizer.param_groups:
            increment_version(group["params"])

    register_optimizer_step_post_hook(count)


class _InPlaceOf(torch.autograd.Function):
    """The copy forward, its gradient to the master backward: what a cast's autograd does, without the cast."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
