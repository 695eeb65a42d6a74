"""The Frechet distance: closed forms, few images, sums over processes, an interval that covers; features, a cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.evaluation import frechet
from ldm.evaluation.features import EfficientNetFeatures, Features, InceptionFeatures, reference_features
from ldm.evaluation.frechet import FrechetDistance, Statistics, frechet_distance
from ldm.evaluation.metric import Batch
from ldm.evaluation.protocol import Value
from ldm.networks.efficientnet import EfficientNetLite0
from tests.evaluation.features import Given, GivenReference

DIM = 12


class Pixels(Features):
    """The first numbers of an image as its features."""

    name, resize = "pixels", "none"

    def __init__(self, scale: float = 1.0) -> None:
        linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(linear.weight, scale)
        super().__init__(linear)
        self.scale = scale

    def extract(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)[:, :DIM] * self.scale / 255.0


def normal(n: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, dtype=torch.float64, generator=generator)


def of(features: Tensor) -> Statistics:
    return Statistics.from_sums(len(features), features.sum(0), features.T @ features)


def images(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 4, 4, generator=generator)


def batch(images: Tensor, indices: Tensor | None = None) -> Batch:
    return Batch(images, [""] * len(images), torch.arange(len(images)) if indices is None else indices)


def distance(features: Features, reference: Tensor) -> FrechetDistance:
    metric = FrechetDistance(features)
    metric.set_reference(GivenReference(reference))
    return metric


def value_of(metric: FrechetDistance) -> Value:
    return metric.compute()[metric.features.frechet_label]


def test_statistics_are_the_sample_mean_and_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(50, 5) * 2 + 3
    monkeypatch.setattr(frechet, "CHUNK", 7)
    assert torch.allclose(Statistics.of(x).covariance, torch.cov(x.T))
    assert torch.allclose(Statistics.of(x).mean, x.mean(0)) and Statistics.of(x).count == 50
    assert torch.allclose(of(x).mean, x.mean(0))
    assert torch.allclose(of(x).covariance, torch.cov(x.T))


def test_covariances_that_do_not_commute() -> None:
    """For 2 x 2 matrices tr sqrt(M) = sqrt(tr M + 2 sqrt(det M))."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()
    product = a @ b
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    zero = torch.zeros(2).double()
    found = frechet_distance(Statistics(9, zero, a), Statistics(9, zero, b))
    assert found == pytest.approx(float(a.trace() + b.trace() - 2 * root), rel=1e-12)


def test_with_fewer_images_than_features_it_is_exact() -> None:
    """A shift of the same few images: the distance is the shift's square, to rounding."""
    x = normal(10, 200)
    shift = torch.linspace(0, 1, 200).double()
    assert frechet_distance(of(x), of(x + shift)) == pytest.approx(float(shift.square().sum()), abs=1e-9)
    y = normal(30, 200, seed=1) * 1.5
    a, b = (x - x.mean(0)) / 9**0.5, (y - y.mean(0)) / 29**0.5
    shared = torch.linalg.svdvals(a @ b.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * shared
    assert frechet_distance(of(x), of(y)) == pytest.approx(float(expected), abs=1e-9)


def test_batches_and_processes_add_up() -> None:
    reference, pictures = normal(40, DIM), images(60)
    whole = distance(Pixels(), reference)
    whole.update(batch(pictures))
    parts = [distance(Pixels(), reference) for _ in range(2)]
    for rank, part in enumerate(parts):
        part.update(batch(pictures[rank::2], torch.arange(60)[rank::2]))
    for name in ("count", "total", "outer"):
        setattr(parts[0], name, getattr(parts[0], name) + getattr(parts[1], name))
    assert value_of(parts[0])[:3] == pytest.approx(value_of(whole)[:3], abs=1e-9)
    expected = frechet_distance(of(Pixels()(pictures).double()), of(reference))
    assert value_of(whole).value == pytest.approx(expected, abs=1e-12)


def test_the_interval_is_as_wide_as_repetitions_vary() -> None:
    """The mean half width over repetitions against 2.26 (Student, 9 degrees) standard deviations."""
    features = Pixels()
    metric = distance(features, features(images(4000, seed=99)))
    values, halves = [], []
    for seed in range(60):
        metric.reset()
        metric.update(batch((images(300, seed) * 0.9).clamp(0, 1)))
        value = value_of(metric)
        assert value.ci_low is not None and value.ci_high is not None
        assert value.ci_low <= value.value <= value.ci_high
        values.append(value.value)
        halves.append(value.ci_high - value.value)
    expected = 2.262 * float(torch.tensor(values).std())
    assert sum(halves) / len(halves) == pytest.approx(expected, rel=0.35)


def test_the_labels_are_fid_and_kid_for_inception_alone(inception_file: Path) -> None:
    network = EfficientNetFeatures(EfficientNetLite0())
    assert (network.frechet_label, network.kernel_label) == (
        "Frechet(efficientnet-lite0)",
        "Kernel(efficientnet-lite0)",
    )
    inception = InceptionFeatures(inception_file)
    assert (inception.frechet_label, inception.kernel_label) == ("FID", "KID")


def test_a_reference_of_another_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"has 5 features, these are \[9, 12\]"):
        distance(Given(), normal(9, 5)).update(batch(normal(9, 12)))
    with pytest.raises(UserError, match="at least 2 images"):
        Statistics.of(normal(1, 5))


def test_the_cache_is_keyed_by_data_and_network(tmp_path: Path) -> None:
    read = []

    def source() -> Iterator[Tensor]:
        read.append(1)
        yield images(20)
        yield images(3, seed=1)

    first = reference_features(source(), Pixels(), tmp_path, "train, 4 px")
    again = reference_features(source(), Pixels(), tmp_path, "train, 4 px")
    assert len(read) == 1
    assert torch.equal(first, again) and first.shape == (23, DIM)
    reference_features(source(), Pixels(), tmp_path, "train, 8 px")
    other = reference_features(source(), Pixels(scale=2.0), tmp_path, "train, 4 px")
    assert len(read) == 3
    assert torch.allclose(other, 2 * first)
    assert torch.equal(reference_features(source(), Pixels(), None, "train, 4 px"), first)
    assert len(read) == 4 and len(list(tmp_path.iterdir())) == 3


def test_images_count_as_if_saved() -> None:
    """Rounded to 8 bits: a change smaller than half a level changes nothing."""
    batch = (images(4) * 255).round() / 255
    assert torch.equal(Pixels()(batch), Pixels()(batch + 0.4 / 255))
    with pytest.raises(UserError, match="float images"):
        Pixels()(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_efficientnet_resizes_and_says_so() -> None:
    features = EfficientNetFeatures(EfficientNetLite0(), size=64)
    assert features(images(2)).shape == (2, 1280)
    assert "64" in features.description and features.fingerprint in features.description
    with pytest.raises(UserError, match="multiple of 32"):
        EfficientNetFeatures(EfficientNetLite0(), size=100)


def test_inception_features_are_those_of_the_resized_pixels(inception_file: Path) -> None:
    features = InceptionFeatures(inception_file)
    flat = torch.full((1, 3, 40, 40), 51 / 255)
    expected = features.network(torch.full((1, 3, 299, 299), (51.0 - 128.0) / 128.0))
    assert expected.std() > 0.1 * expected.max()
    assert torch.allclose(features(flat), expected, atol=1e-5 * float(expected.max()))
