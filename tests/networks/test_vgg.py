"""VGG16: torchvision's layout of weights, the features that LPIPS takes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.networks import vgg
from ldm.networks.vgg import VGG16


@torch.no_grad()
def test_features_are_those_of_torchvisions_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vgg, "STAGES", ((4, 4), (6, 6), (8, 8, 8), (8, 8, 8), (8, 8, 8)))
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    width, taps = 3, []
    for stage in vgg.STAGES:
        for out in stage:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
        taps.append(len(layers) - 1)
        layers.append(nn.MaxPool2d(2))
    features = nn.Sequential(*layers)
    state = {f"features.{k}": v for k, v in features.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")

    x = torch.rand(2, 3, 32, 48) * 2 - 1
    network = VGG16.from_file(tmp_path / "vgg16.pth")
    h = (x - network.shift) / network.scale
    expected = []
    for i, layer in enumerate(features):
        h = layer(h)
        if i in taps:
            expected.append(h)
    assert taps == [3, 8, 15, 22, 29]  # relu1_2, 2_2, 3_3, 4_3, 5_3 in torchvision's vgg16.features
    torch.testing.assert_close(network.features(x), expected)


def test_parameter_count_and_other_files(tmp_path: Path) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in VGG16().parameters()) == 14_714_688
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="has 1 convolutions"):
        VGG16.from_file(tmp_path / "other.pth")
    with pytest.raises(UserError, match="no file at"):
        VGG16.from_file(tmp_path / "missing.pth")
