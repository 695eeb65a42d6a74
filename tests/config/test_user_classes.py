"""A user's own classes: what is wrong with them is one line that names the knob, before anything trains."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.config.build import stages
from ldm.config.compose import compose
from ldm.diffusion.auxiliary import AuxiliaryLoss
from ldm.errors import UserError

HERE = __name__


class WithoutSize(nn.Module):
    """A network without `check_size`, otherwise as the protocol says."""

    def __init__(self, in_channels: int, out_channels: int, context_dim: int, depth: int = 2) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.context_dim, self.vector_dim = context_dim, None
        rates = [rate.item() for rate in torch.linspace(0.0, 0.1, depth)]  # as many transformers do
        self.blocks = nn.ModuleList(nn.Dropout(rate) for rate in rates)

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return z


class Network(WithoutSize):
    def check_size(self, height: int, width: int) -> None:
        pass


class WithoutVector(Network):
    def __init__(self, in_channels: int, out_channels: int, context_dim: int) -> None:
        super().__init__(in_channels, out_channels, context_dim)
        del self.vector_dim


class WithoutChannels(Network):
    def __init__(self, in_channels: int, out_channels: int, context_dim: int) -> None:
        super().__init__(in_channels, out_channels, context_dim)
        del self.in_channels


class Term(AuxiliaryLoss):
    def __init__(self, weight: float, taps: list[str], temperature: float = 1.0) -> None:
        super().__init__(weight, taps)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} is not above 0")

    def forward(self, features: object, batch: object) -> Tensor:
        return torch.zeros(())


def launch(shapes: Path, out: Path, *more: str) -> None:
    overrides = ["experiment=quickstart", "variant=tiny", f"data.train.shards={shapes}/train", "stages=[base]",
                 f"data.val.shards={shapes}/val", f"run_folder={out}", "first_stage_from=null", "latents=null",
                 f"tokenizer_path={out}/tokenizer", "conditioner.tokenizer.captions.shards=${data.train.shards}",
                 *more]  # fmt: skip
    planned, finished = stages(compose("train", overrides), overrides, out)
    planned[0].build(finished)


def network(name: str) -> list[str]:
    widths = [f"network.{width}=auto" for width in ("in_channels", "out_channels", "context_dim")]
    return [f"network._target_={HERE}.{name}", *widths]


def term(**knobs: str) -> list[str]:
    node = {"_target_": f"{HERE}.Term", "weight": "1.0", "taps": "[blocks.1]"} | knobs
    return ["+loss.auxiliary.mine={" + ",".join(f"{name}:{value}" for name, value in node.items()) + "}"]


def test_a_network_whose_constructor_needs_real_numbers_is_built(tiny_shapes: Path, tmp_path: Path) -> None:
    launch(tiny_shapes, tmp_path, *network("Network"), *term())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (network("WithoutVector"), "WithoutVector has no vector_dim"),
        (network("WithoutChannels"), "WithoutChannels has no in_channels"),
        (network("WithoutSize"), "WithoutSize has no check_size"),
        (network("Network") + term(taps="[block.1]"), r"^loss\.auxiliary\.mine\.taps: .*did you mean blocks\.1"),
        (term(taps="[middel]"), r"^loss\.auxiliary\.mine\.taps: UNet .*did you mean middle"),
        (
            network("Network") + term(temperature="0.0"),
            rf"^loss\.auxiliary\.mine: {HERE}\.Term cannot be built: ValueError: temperature=0\.0 is not above 0",
        ),
        (network("Network") + term(temprature="1.0"), r"^loss\.auxiliary\.mine\.temprature: .*temperature"),
        (network("Netwrok"), "Netwrok.*did you mean Network"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(overrides: list[str], message: str, tiny_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        launch(tiny_shapes, tmp_path, *overrides)
    assert "\n" not in str(error.value)
