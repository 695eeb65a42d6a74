"""A denoising network is known by its attributes, not by its class."""

import pytest
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import V
from ldm.diffusion.schedule import ScaledLinear
from ldm.errors import UserError
from ldm.networks.protocol import ATTRIBUTES, check_network
from ldm.networks.unet import UNet
from tests.networks.toy import ToyNetwork


class Custom(ToyNetwork):
    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return z


def test_a_custom_network_and_the_unet_are_taken() -> None:
    check_network(Custom())
    check_network(UNet(4, 4, 8, (1,), 1, (False,), num_heads=1, groups=4))
    Denoiser(Custom(), ScaledLinear(), V())


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_first_missing_attribute_is_named(name: str) -> None:
    """Also where nn.Module's own forward would only raise at the first step."""
    present = {**vars(ToyNetwork), **vars(Custom)}
    parts = {key: value for key, value in present.items() if key in ATTRIBUTES and key != name}
    broken = type("Broken", (nn.Module,), parts)
    with pytest.raises(UserError, match=f"network: Broken has no {name} "):
        Denoiser(broken(), ScaledLinear(), V())


def test_of_several_the_first_is_named() -> None:
    with pytest.raises(UserError, match="Linear has no in_channels"):
        check_network(nn.Linear(2, 2))
