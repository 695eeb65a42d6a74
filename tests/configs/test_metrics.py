"""Every configs/metric/*.yaml: it builds, measures pictures, says what it depends on, and 1 process = 2 processes.

Weights that are not to be had here are put in by the class that asks for them; a new metric over a network
that is listed in `weights` is covered as it stands.
"""

from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from omegaconf import OmegaConf
from torch import Tensor

from ldm.config.build import build, measures
from ldm.config.compose import CONFIGS, compose
from ldm.errors import UserError
from ldm.evaluation.evaluate import ReferenceSet
from ldm.evaluation.features import Features
from ldm.evaluation.measures import Batch, Measure
from ldm.evaluation.vision import ClipFeatures
from ldm.examples.shapes import caption, splits

METRICS = sorted(path.stem for path in (CONFIGS / "metric").glob("*.yaml"))
N, M = 7, 6  # pictures, and pictures of the reference


@pytest.fixture(scope="module")
def weights(tiny_clip: Path, tiny_dinov2: Path, inception_file: Path) -> dict[str, dict[str, str]]:
    """The knobs that name weights, by the class that has them."""
    return {
        "ldm.evaluation.features.InceptionFeatures": {"path": str(inception_file)},
        "ldm.evaluation.vision.ClipFeatures": {"source": str(tiny_clip)},
        "ldm.evaluation.vision.ClassTokenFeatures": {"source": str(tiny_dinov2)},
        "ldm.evaluation.vision.PooledFeatures": {"source": str(tiny_dinov2)},
        "ldm.evaluation.measures.ClipScore": {"model": str(tiny_clip)},
    }


def measure_of(name: str, weights: dict[str, dict[str, str]], features: dict[str, Any] | None = None) -> Measure:
    """The measure of a configuration with these weights, or with these features in the place of its own."""
    node: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONFIGS / "metric" / f"{name}.yaml"))  # type: ignore[assignment]
    if "features" in node:
        node["features"] = features or node["features"] | weights.get(node["features"]["_target_"], {})
    measure = build(OmegaConf.create(node | weights.get(node["_target_"], {})))
    assert isinstance(measure, Measure)
    return measure


def pictures(n: int, seed: int) -> tuple[Tensor, list[str]]:
    split = splits(n, 1, 32, seed, False)[0]
    images = torch.stack([torch.from_numpy(split.image(i)) for i in range(n)])
    return images.permute(0, 3, 1, 2) / 255, [caption(split.combination(i)) for i in range(n)]


class Reference:
    """The reference pictures."""

    def __init__(self) -> None:
        self.extracted: list[str] = []

    def features(self, network: Features) -> Tensor:
        self.extracted.append(network.description)
        return network(pictures(M, 1)[0])


def measured(measure: Measure, indices: range) -> dict[str, list[float]]:
    """Values and intervals over the pictures of these indices, and over the other processes' ones."""
    images, captions = pictures(N, 0)
    reference = Reference()
    measure.begin(reference)
    measure.update(Batch(images.flip(0), captions[::-1]))
    measure.begin(reference)  # anew: nothing of what came before is left
    for i in indices:  # one at a time, since a batch holds consecutive pictures
        measure.update(Batch(images[i : i + 1], captions[i : i + 1], i))
    found = measure.values()
    return {name: [v.value, v.ci_low or 0.0, v.ci_high or 0.0] for name, v in found.items()}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_measures_pictures_and_says_what_it_depends_on(
    name: str, weights: dict[str, dict[str, str]]
) -> None:
    measure, reference = measure_of(name, weights), Reference()
    images, captions = pictures(N, 0)
    measure.begin(reference)
    measure.update(Batch(images[:4], captions[:4]))
    measure.update(Batch(images[4:], captions[4:], 4))
    values = measure.values()
    assert values
    for value in values.values():
        assert isfinite(value.value)
        assert value.ci_low is not None and value.ci_high is not None
        assert value.ci_low <= value.value <= value.ci_high and value.ci_low < value.ci_high
    assert len(reference.extracted) == int(measure.needs_reference)
    assert all(len(told) > 10 for told in measure.descriptions().values()) and measure.descriptions()
    if measure.needs_reference:
        assert set(measure.descriptions()) == set(values)


def of_all(weights: dict[str, dict[str, str]], indices: range) -> dict[str, dict[str, list[float]]]:
    """Every metric, over a tiny feature network: how features add up is not the network's business."""
    tiny = {"_target_": "ldm.evaluation.vision.ClipFeatures"} | weights["ldm.evaluation.vision.ClipFeatures"]
    return {name: measured(measure_of(name, weights, tiny), indices) for name in METRICS}


def one_of_two(rank: int, weights: dict[str, dict[str, str]], folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(of_all(weights, range(rank, N, 2)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(weights: dict[str, dict[str, str]], tmp_path: Path) -> None:
    mp.start_processes(one_of_two, (weights, str(tmp_path)), nprocs=2, start_method="fork")
    alone = of_all(weights, range(N))
    for rank in (0, 1):
        together = torch.load(tmp_path / f"{rank}.pt")
        for name in METRICS:
            assert together[name].keys() == alone[name].keys()
            for label, values in alone[name].items():
                assert together[name][label] == pytest.approx(values, rel=1e-6, abs=1e-9), (name, label)


def test_a_network_sees_each_picture_once_however_many_metrics_ask(
    weights: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"_target_": "ldm.evaluation.vision.ClipFeatures"} | weights["ldm.evaluation.vision.ClipFeatures"]
    both = [measure_of(name, weights, tiny) for name in ("fid", "kid")]
    seen: list[int] = []
    extract = ClipFeatures.extract
    monkeypatch.setattr(ClipFeatures, "extract", lambda self, x: seen.append(len(x)) or extract(self, x))
    batch = Batch(*pictures(N, 0))
    for measure in both:
        measure.begin(Reference())
        measure.update(batch)
    assert seen == [M, N, M]  # `Reference` here keeps nothing, `ReferenceSet` does


def test_a_reference_set_keeps_its_features(tiny_shapes: Path, tiny_clip: Path, tmp_path: Path) -> None:
    network, seen = ClipFeatures(str(tiny_clip)), []
    forward, network.forward = network.forward, lambda x: seen.append(len(x)) or forward(x)  # type: ignore[method-assign]
    sets = [ReferenceSet("val", f"{tiny_shapes}/val", (32, 32), n, tmp_path) for n in (12, 12, 10)]
    found = [reference.features(network) for reference in (sets[0], *sets)]
    assert seen == [12, 10]  # once in this process, once for the next one, and anew for another n
    assert torch.equal(found[0], found[2]) and found[0].shape == (12, 8)
    torch.testing.assert_close(found[3], found[0][:10])


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """torch.hub's folder for weights, without any."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    yield tmp_path / "hub" / "checkpoints"


def test_a_metric_without_weights_is_told_and_the_others_are_built(no_weights: Path) -> None:
    options = compose("evaluate", ["checkpoint=x", "out=y"]).metric_options
    found, missing = measures(["fid", "alignment", "clip_score"], options, torch.device("cpu"))
    assert len(found) == 1 and list(missing) == ["fid", "clip_score"]
    for told in ("pt_inception-2015-12-05-6726825d.pth", "https://github.com/mseitzer/pytorch-fid", str(no_weights)):
        assert told in missing["fid"]
    assert "metric_options.fid.features.path" in missing["fid"]
    assert "hf download openai/clip-vit-large-patch14" in missing["clip_score"]
    assert "metric_options.clip_score.model" in missing["clip_score"]
    with pytest.raises(UserError, match="did you mean fid"):
        measures(["fidd"], options, torch.device("cpu"))


def test_a_path_given_for_fid_is_kids_as_well(inception_file: Path) -> None:
    given = f"metric_options.fid.features.path={inception_file}"
    options = compose("evaluate", ["checkpoint=x", "out=y", given]).metric_options
    found, missing = measures(["fid", "kid"], options, torch.device("cpu"))
    assert [list(m.descriptions()) for m in found] == [["FID"], ["KID"]] and not missing
    with pytest.raises(UserError, match="has no such knob; did you mean path"):
        measures(["kid"], OmegaConf.create({"kid": {"features": {"pth": "x"}}}), torch.device("cpu"))
