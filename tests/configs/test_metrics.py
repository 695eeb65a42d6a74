"""Every configs/metric/*.yaml: it builds, measures pictures, says what it depends on, and 1 process = 2 processes.

Weights that are not available here are replaced, by the class that has them; a new metric over a network
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

from ldm.commands.metric_options import build_metrics
from ldm.config.check import build
from ldm.config.compose import CONFIGS, compose
from ldm.errors import UserError
from ldm.evaluation.evaluate import ReferenceSet
from ldm.evaluation.features import Features
from ldm.evaluation.metric import Batch, Metric
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
        "ldm.evaluation.clip_score.CLIPScore": {"model": str(tiny_clip)},
    }


def metric_of(name: str, weights: dict[str, dict[str, str]], features: dict[str, Any] | None = None) -> Metric:
    """The metric of a configuration with these weights, or with these features instead of its own."""
    node: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONFIGS / "metric" / f"{name}.yaml"))  # type: ignore[assignment]
    if "features" in node:
        node["features"] = features or node["features"] | weights.get(node["features"]["_target_"], {})
    metric = build(OmegaConf.create(node | weights.get(node["_target_"], {})))
    assert isinstance(metric, Metric)
    return metric


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


def batch(images: Tensor, captions: list[str], first: int = 0) -> Batch:
    return Batch(images, captions, torch.arange(first, first + len(images)))


def measured(metric: Metric, indices: range) -> dict[str, list[float]]:
    """Values and intervals over the pictures of these indices, and over the other processes' ones."""
    images, captions = pictures(N, 0)
    reference = Reference()
    metric.set_reference(reference)
    metric.update(batch(images.flip(0), captions[::-1]))
    metric.set_reference(reference) if metric.needs_reference else metric.reset()  # nothing of what came before is left
    for i in indices:
        metric.update(batch(images[i : i + 1], captions[i : i + 1], i))
    found = metric.compute()
    return {name: [v.value, v.ci_low or 0.0, v.ci_high or 0.0] for name, v in found.items()}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_measures_pictures_and_says_what_it_depends_on(
    name: str, weights: dict[str, dict[str, str]]
) -> None:
    metric, reference = metric_of(name, weights), Reference()
    images, captions = pictures(N, 0)
    for _ in range(2):  # the features of a reference are extracted once
        if metric.needs_reference:
            metric.set_reference(reference)
    metric.update(batch(images[:4], captions[:4]))
    metric.update(batch(images[4:], captions[4:], 4))
    values = metric.compute()
    assert values
    for value in values.values():
        assert isfinite(value.value)
        assert value.ci_low is not None and value.ci_high is not None
        assert value.ci_low <= value.value <= value.ci_high and value.ci_low < value.ci_high
    assert len(reference.extracted) == int(metric.needs_reference)
    assert all(len(text) > 10 for text in metric.descriptions().values()) and metric.descriptions()
    if metric.needs_reference:
        assert set(metric.descriptions()) == set(values)


def of_all(weights: dict[str, dict[str, str]], indices: range) -> dict[str, dict[str, list[float]]]:
    """Every metric, over a tiny feature network: how features add up is not the network's business."""
    tiny = {"_target_": "ldm.evaluation.vision.ClipFeatures"} | weights["ldm.evaluation.vision.ClipFeatures"]
    return {name: measured(metric_of(name, weights, tiny), indices) for name in METRICS}


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
    both = [metric_of(name, weights, tiny) for name in ("fid", "kid")]
    seen: list[int] = []
    extract = ClipFeatures.extract
    monkeypatch.setattr(ClipFeatures, "extract", lambda self, x: seen.append(len(x)) or extract(self, x))
    seen_by_both = batch(*pictures(N, 0))
    for metric in both:
        metric.set_reference(Reference())
        metric.update(seen_by_both)
    assert seen == [M, N, M]  # `Reference` here keeps nothing, `ReferenceSet` does


def test_a_reference_set_keeps_its_features(tiny_shapes: Path, tiny_clip: Path, tmp_path: Path) -> None:
    network, seen = ClipFeatures(str(tiny_clip)), []
    forward, network.forward = network.forward, lambda x: seen.append(len(x)) or forward(x)  # type: ignore[method-assign]
    sets = [ReferenceSet("val", f"{tiny_shapes}/val", (32, 32), n, tmp_path) for n in (12, 12, 10)]
    found = [reference.features(network) for reference in (sets[0], *sets)]
    assert seen == [12, 10]  # once in this process, once for the next one, and again for another n
    assert torch.equal(found[0], found[2]) and found[0].shape == (12, 8)
    torch.testing.assert_close(found[3], found[0][:10])


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """torch.hub's folder for weights, without any."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    yield tmp_path / "hub" / "checkpoints"


def test_a_metric_without_weights_is_reported_and_the_others_are_built(no_weights: Path) -> None:
    options = compose("evaluate", ["checkpoint=x", "out=y"]).metric_options
    found, missing = build_metrics(["fid", "alignment", "clip_score"], options, torch.device("cpu"))
    assert len(found) == 1 and list(missing) == ["fid", "clip_score"]
    for part in ("pt_inception-2015-12-05-6726825d.pth", "https://github.com/mseitzer/pytorch-fid", str(no_weights)):
        assert part in missing["fid"]
    assert "metric_options.fid.features.path" in missing["fid"]
    assert "hf download openai/clip-vit-large-patch14" in missing["clip_score"]
    assert "metric_options.clip_score.model" in missing["clip_score"]
    with pytest.raises(UserError, match="did you mean fid"):
        build_metrics(["fidd"], options, torch.device("cpu"))


def test_a_path_given_for_fid_is_kids_as_well(inception_file: Path) -> None:
    given = f"metric_options.fid.features.path={inception_file}"
    options = compose("evaluate", ["checkpoint=x", "out=y", given]).metric_options
    for names, labels in ((["fid", "kid"], [["FID"], ["KID"]]), (["kid"], [["KID"]])):
        found, missing = build_metrics(names, options, torch.device("cpu"))
        assert [list(m.descriptions()) for m in found] == labels and not missing
    with pytest.raises(UserError, match="has no such knob; did you mean path"):
        build_metrics(["kid"], OmegaConf.create({"kid": {"features": {"pth": "x"}}}), torch.device("cpu"))


def test_options_without_effect_are_refused(inception_file: Path) -> None:
    given = f"metric_options.fid.features.path={inception_file}"
    options = compose("evaluate", ["checkpoint=x", "out=y", given]).metric_options
    with pytest.raises(UserError, match=r"metric_options.fid.features.path has no effect: fid is not in .*alignment"):
        build_metrics(["alignment"], options, torch.device("cpu"))
    for unknown in ({"fidd": {"features": {"path": None}}}, {"frechet_dino": {}}):
        with pytest.raises(UserError, match="there is no metric"):
            build_metrics(["alignment"], OmegaConf.create(unknown), torch.device("cpu"))
    found, _ = build_metrics(
        ["alignment"], compose("evaluate", ["checkpoint=x", "out=y"]).metric_options, torch.device("cpu")
    )
    assert len(found) == 1
