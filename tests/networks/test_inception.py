"""FID's Inception: the published layout, folded batch norms, TensorFlow 1's resize."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.inception import (
    BATCH_NORM_EPS,
    BlockA,
    BlockE,
    Conv,
    InceptionV3,
    fold_state_dict,
    resize_tensorflow1,
)


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return InceptionV3()


def published_state(network: InceptionV3) -> dict[str, Tensor]:
    """A state dict with random numbers in the layout of the published file."""
    generator = torch.Generator().manual_seed(0)
    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for name, conv in network.named_modules():
        if isinstance(conv, Conv):
            state[f"{name}.conv.weight"] = conv.weight + 0.0
            for kind in ("weight", "bias", "running_mean", "running_var"):
                state[f"{name}.bn.{kind}"] = torch.rand(conv.out_channels, generator=generator) + 0.5
    return state


def test_it_has_the_published_parameters(network: InceptionV3) -> None:
    """torchvision's count without the auxiliary head, 23,834,568, less its classifier; norms count twice."""
    convolutions = [module for module in network.modules() if isinstance(module, Conv)]
    assert len(convolutions) == 94
    counted = sum(conv.weight.numel() + 2 * conv.out_channels for conv in convolutions)
    assert counted == 23_834_568 - (2048 * 1000 + 1000)


def test_feature_maps_have_the_papers_sizes(network: InceptionV3) -> None:
    with torch.inference_mode():
        maps = network.features(torch.zeros(1, 3, 299, 299))
        assert [tuple(h.shape[1:]) for h in maps] == [(64, 73, 73), (192, 35, 35), (768, 17, 17), (2048, 8, 8)]
        assert network(torch.zeros(2, 3, 299, 299)).shape == (2, 2048)
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_a_folded_batch_norm_is_the_batch_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, eps=BATCH_NORM_EPS).eval()
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        assert isinstance(tensor, Tensor)
        tensor.data.uniform_(0.5, 1.5, generator=generator)
    state = {"x.conv.weight": conv.weight} | {f"x.bn.{name}": value for name, value in norm.state_dict().items()}
    folded = fold_state_dict(state)
    x = torch.rand(2, 3, 8, 8, generator=generator)
    assert torch.allclose(F.conv2d(x, folded["x.weight"], folded["x.bias"]), norm(conv(x)), atol=1e-6)


def test_the_published_file_loads_and_another_is_refused(network: InceptionV3, tmp_path: Path) -> None:
    state = published_state(network)
    torch.save(state, tmp_path / "pt_inception.pth")
    loaded = InceptionV3.from_file(tmp_path / "pt_inception.pth")
    scale = state["Mixed_5b.branch1x1.bn.weight"] / (state["Mixed_5b.branch1x1.bn.running_var"] + 1e-3).sqrt()
    expected = network.Mixed_5b.branch1x1.weight * scale[:, None, None, None]
    assert torch.allclose(loaded.Mixed_5b.branch1x1.weight, expected)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="lacks 188"):
        InceptionV3.from_file(tmp_path / "resnet.pth")


def test_average_pools_leave_the_padding_out() -> None:
    """On a constant image each average pool gives the constant, at the border as well."""
    block = BlockA(3, 1)
    nn.init.ones_(block.branch_pool.weight)
    nn.init.zeros_(block.branch_pool.bias)  # type: ignore[arg-type]
    assert torch.allclose(block(torch.ones(1, 3, 5, 5))[:, -1], torch.tensor(3.0))


def test_the_last_block_pools_by_the_maximum() -> None:
    x = torch.zeros(1, 4, 5, 5)
    x[0, :, 2, 2] = 9.0
    for max_pool, expected in ((True, 36.0), (False, 4.0)):
        block = BlockE(4, max_pool)
        nn.init.ones_(block.branch_pool.weight)
        nn.init.zeros_(block.branch_pool.bias)  # type: ignore[arg-type]
        assert block(x)[0, -1, 1, 1].item() == pytest.approx(expected)


def test_the_resize_is_tensorflows() -> None:
    """A ramp of length 2 to length 4: TensorFlow 1 reads at 0, 0.5, 1, 1.5 (clamped), not at half pixels."""
    ramp = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    assert resize_tensorflow1(ramp, 4)[0, 0, 0].tolist() == [0.0, 0.5, 1.0, 1.0]
    image = torch.rand(1, 3, 299, 299)
    assert torch.allclose(resize_tensorflow1(image), image, atol=1e-6)
