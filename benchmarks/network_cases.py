"""What `benchmarks.networks` times: each case's contenders, with the same weights and inputs on all sides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks import side_by_side as bench
from benchmarks.side_by_side import Contender, Run
from ldm.first_stage.autoencoder import FirstStage
from ldm.first_stage.regularizer import KLRegularizer
from ldm.interop.names import first_stage_to_diffusers, unet_to_diffusers
from ldm.networks.autoencoder import Decoder, Encoder
from ldm.networks.cpu import keep_freed_memory
from ldm.networks.unet import UNet
from tests.parity.names import copy_weights, spread


@dataclass(frozen=True)
class Settings:
    """What is measured, and on what."""

    device: torch.device
    precisions: list[str]
    compiled: bool
    unet_channels: int
    context_dim: int
    batch: int
    latent: int
    first_stage_channels: int
    images: int
    pixels: int
    small: bool


@dataclass(frozen=True)
class Side:
    """A way to run a network: whose, and with what settings."""

    who: str
    ours: bool
    channels_last: bool
    fused: bool


SIDES = (Side("diffusers", False, False, False), Side("diffusers +", False, True, True), Side("ours", True, True, True))
Case = Callable[[Settings], list[Contender]]


def contenders(s: Settings, make: Callable[[Side, str], tuple[list[nn.Module], Run]]) -> list[Contender]:
    """Every side at every precision, eager and, where asked, compiled; `make` gives the networks and what is timed."""
    found = []
    for compiled in [False, True] if s.compiled else [False]:
        for precision in s.precisions:
            for side in SIDES:
                if compiled and side.who == "diffusers":
                    continue  # "diffusers +" is the stronger
                networks, run = make(side, precision)
                if compiled:
                    for network in networks:
                        network.compile()
                timed = autocast(run, side, s.device, precision)
                found.append(Contender(side.who, precision, compiled, timed, memory(side, s.device, timed)))
    return found


def autocast(run: Run, side: Side, device: torch.device, precision: str) -> Run:
    """The run, under autocast where the precision is bf16: ours as Lightning enters it, diffusers' as torch does."""

    def under() -> object:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=not side.ours):
            return run()

    return under


def memory(side: Side, device: torch.device, run: Run) -> Run | None:
    """What sets a side's handling of freed memory: ours as train.py does it on a CPU, diffusers' as it comes.

    Ours runs once more then, to have the memory that diffusers' turn gave back.
    """

    def kept() -> None:
        keep_freed_memory()
        run()

    return None if device.type != "cpu" else kept if side.ours else bench.give_freed_memory_back


def placed(module: nn.Module, side: Side, device: torch.device) -> nn.Module:
    memory_format = torch.channels_last if side.channels_last else torch.contiguous_format
    return module.to(device).to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]


def train_step(parameters: list[nn.Parameter], side: Side, loss: Callable[[], Tensor]) -> Run:
    """Forward, backward, AdamW; backward and optimizer outside of autocast, as autocast asks."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True if side.fused else None)

    def step() -> None:
        value = loss()
        with torch.autocast(value.device.type, enabled=False):
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


# ------------------------------------------------------------------------------------------------------- UNet


def our_unet(s: Settings) -> UNet:
    torch.manual_seed(0)
    unet = UNet(
        4, 4, s.unet_channels, (1, 2, 4, 4), 2, (True, True, True, False), num_heads=8, context_dim=s.context_dim
    )
    spread(unet)
    return unet


def their_unet(s: Settings) -> nn.Module:
    ours = our_unet(s)
    peer = diffusers.UNet2DConditionModel(
        block_out_channels=tuple(s.unet_channels * mult for mult in (1, 2, 4, 4)),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=8,  # diffusers means the number of heads
        cross_attention_dim=s.context_dim,
    )
    copy_weights(ours, peer, unet_to_diffusers(dict(ours.named_parameters())))
    return peer


def unet_call(side: Side, s: Settings) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The network, and its output for inputs that are the same for all."""
    network = placed(our_unet(s) if side.ours else their_unet(s), side, s.device)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(s.batch, 4, s.latent, s.latent, generator=random).to(s.device)
    t = torch.linspace(0, 999, s.batch).round().to(s.device)
    tokens = torch.randn(s.batch, 77, s.context_dim, generator=random).to(s.device)
    if side.ours:
        return network, lambda: network(x, t, tokens)
    return network, lambda: network(x, t, tokens, return_dict=False)[0]


def unet_forward(s: Settings) -> list[Contender]:
    def make(side: Side, precision: str) -> tuple[list[nn.Module], Run]:
        network, call = unet_call(side, s)
        return [network.eval()], torch.no_grad()(call)

    return contenders(s, make)


def unet_train(s: Settings) -> list[Contender]:
    target = torch.randn(s.batch, 4, s.latent, s.latent, device=s.device)

    def make(side: Side, precision: str) -> tuple[list[nn.Module], Run]:
        network, call = unet_call(side, s)
        network.train()
        return [network], train_step(
            list(network.parameters()), side, lambda: (call().float() - target).square().mean()
        )

    return contenders(s, make)


# ------------------------------------------------------------------------------------------------ autoencoder


def our_autoencoder(s: Settings) -> FirstStage:
    torch.manual_seed(0)
    width, mult = s.first_stage_channels, (1, 2, 4, 4)
    return FirstStage(Encoder(3, width, mult, 2, 8), KLRegularizer(), Decoder(4, width, mult, 2), latent_channels=4)


def their_autoencoder(s: Settings) -> nn.Module:
    ours = our_autoencoder(s)
    peer = diffusers.AutoencoderKL(
        block_out_channels=tuple(s.first_stage_channels * mult for mult in (1, 2, 4, 4)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    copy_weights(ours, peer, first_stage_to_diffusers(dict(ours.named_parameters())))
    return peer


def autoencoder(side: Side, s: Settings) -> tuple[Any, list[nn.Module]]:
    """The autoencoder, and its parts that are compiled."""
    made: Any = placed(our_autoencoder(s) if side.ours else their_autoencoder(s), side, s.device)
    return made, [made.encoder, made.decoder]


def pictures(s: Settings) -> Tensor:
    values = torch.rand(s.images, 3, s.pixels, s.pixels, generator=torch.Generator().manual_seed(2))
    return (values * 2 - 1).to(s.device)


def encode(s: Settings) -> list[Contender]:
    images = pictures(s)

    def make(side: Side, precision: str) -> tuple[list[nn.Module], Run]:
        model, networks = autoencoder(side, s)
        model.eval()
        call = (lambda: model.encode(images)) if side.ours else (lambda: model.encode(images).latent_dist.mode())
        return networks, torch.no_grad()(call)

    return contenders(s, make)


def decode(s: Settings) -> list[Contender]:
    z = torch.randn(s.images, 4, s.pixels // 8, s.pixels // 8, generator=torch.Generator().manual_seed(3))
    z = z.to(s.device)

    def make(side: Side, precision: str) -> tuple[list[nn.Module], Run]:
        model, networks = autoencoder(side, s)
        model.eval()
        call = (lambda: model.decode(z)) if side.ours else (lambda: model.decode(z, return_dict=False)[0])
        return networks, torch.no_grad()(call)

    return contenders(s, make)


def autoencoder_train(s: Settings) -> list[Contender]:
    images = pictures(s)
    noise = torch.randn(s.images, 4, s.pixels // 8, s.pixels // 8, device=s.device)

    def make(side: Side, precision: str) -> tuple[list[nn.Module], Run]:
        model, networks = autoencoder(side, s)
        model.train()

        def ours() -> Tensor:
            reconstruction, regularized = model(images, noise)
            return (reconstruction.float() - images).abs().mean() + 1e-6 * regularized.loss.float().mean()

        def theirs() -> Tensor:
            posterior = model.encode(images).latent_dist
            reconstruction = model.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
            return (reconstruction.float() - images).abs().mean() + 1e-6 * posterior.kl().float().mean()

        return networks, train_step(list(model.parameters()), side, ours if side.ours else theirs)

    return contenders(s, make)


CASES: dict[str, Case] = {
    "unet_forward": unet_forward,
    "unet_train": unet_train,
    "encode": encode,
    "decode": decode,
    "autoencoder_train": autoencoder_train,
}
