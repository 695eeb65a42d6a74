"""The metrics against numbers that are known: true pictures, closed forms; provenance; reference sets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.data.shards.write import write_shard
from ldm.errors import UserError
from ldm.evaluation.evaluate import Evaluation, ReferenceSet
from ldm.evaluation.frechet import FrechetDistance, Statistics, frechet_distance
from ldm.evaluation.interval import wilson
from ldm.evaluation.kernel import KernelDistance
from ldm.evaluation.metric import Batch, Metric
from ldm.evaluation.protocol import Protocol, Result, Value, require_comparable
from ldm.evaluation.reconstruction import psnr
from ldm.examples.alignment import Alignment
from ldm.examples.shapes import caption, splits
from tests.data.make import sample
from tests.evaluation.features import Given


def pictures(n: int, size: int, relations: bool = False) -> tuple[torch.Tensor, list[str]]:
    split = splits(n, n, size, 5, relations)[0]
    images = torch.from_numpy(np.stack([split.image(i) for i in range(n)]))
    return images.permute(0, 3, 1, 2).float() / 255, [caption(split.combination(i)) for i in range(n)]


@pytest.mark.parametrize(("size", "relations", "least"), [(64, False, 0.99), (32, False, 0.95), (64, True, 0.97)])
def test_true_pictures_show_what_their_captions_say(size: int, relations: bool, least: float) -> None:
    images, captions = pictures(200, size, relations)
    metric = Alignment()
    metric.update(Batch(images, captions, torch.arange(len(images))))
    assert min(value.value for value in metric.compute().values()) >= least


def test_mismatched_captions_are_at_chance() -> None:
    images, captions = pictures(300, 64)
    metric = Alignment()
    metric.update(Batch(images, captions[1:] + captions[:1], torch.arange(300)))
    shares = {name: value.value for name, value in metric.compute().items()}
    assert shares["all"] <= 0.02
    assert shares["colour"] <= 0.25
    assert 0.35 <= shares["size"] <= 0.65


def test_pictures_of_nothing_show_nothing() -> None:
    _, captions = pictures(20, 64)
    noise = torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for images in (torch.full((20, 3, 64, 64), 0.9), noise):
        metric = Alignment()
        metric.update(Batch(images, captions, torch.arange(len(images))))
        assert max(value.value for value in metric.compute().values()) == 0.0


def test_the_frechet_distance_of_known_gaussians() -> None:
    mean, scale = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.5, 2.0, 1.0]).double()
    a = Statistics(100, torch.zeros(3).double(), torch.eye(3).double())
    b = Statistics(100, mean, torch.diag(scale**2))
    expected = float(mean.square().sum() + (1 - scale).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_psnr_of_a_known_error() -> None:
    images = torch.zeros(2, 3, 8, 8)
    assert psnr(images, images + 0.1).tolist() == pytest.approx([20.0, 20.0])


def test_wilsons_interval_holds_its_textbook_value() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)


def protocol(**changes: object) -> Protocol:
    given: dict[str, object] = {
        "task": "text_to_image", "reference": "r", "prompts": "p", "weights": "w", "ema": True,
        "metrics": {}, "n_images": 10, "seed": 0, "size": (64, 64), "guidance_scale": 1.0,
    }  # fmt: skip
    return Protocol(**(given | changes))  # type: ignore[arg-type]


def test_a_result_reads_back_and_shows_tampering(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    result = Result(protocol(), {"all": Value(0.5, 0.4, 0.6)})
    result.write(path)
    assert Result.read(path) == result
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(UserError, match="changed after it was written"):
        Result.read(path)


def test_results_of_different_protocols_share_no_table() -> None:
    a, b = (Result(protocol(guidance_scale=scale), {}) for scale in (1.0, 2.0))
    require_comparable([a, b], ["guidance_scale"])
    with pytest.raises(UserError, match="guidance_scale"):
        require_comparable([a, b])
    with pytest.raises(UserError, match="seed"):
        require_comparable([a, Result(protocol(seed=1), {})], ["guidance_scale"])


def test_a_damaged_picture_or_caption_of_a_reference_set_is_an_error(tmp_path: Path) -> None:
    """Not a substitute, as in training: it would be measured with another caption."""
    for name, part in (("picture", {"png": b"no picture"}), ("caption", {"txt": b"", "json": b"{}"})):
        samples = [sample(i) for i in range(4)]
        samples[2][1].update(part)
        write_shard(tmp_path / name / "00000.tar", iter(samples))
        with pytest.raises(UserError, match=r"val: 000002 in .*00000.tar cannot be evaluated on"):
            list(ReferenceSet("val", str(tmp_path / name), (16, 16), 4))
        assert [images.shape for images in ReferenceSet("val", str(tmp_path / name), (16, 16), 2)] == [(2, 3, 16, 16)]


def test_two_metrics_of_one_name_are_refused_before_anything_is_measured() -> None:
    metrics = [KernelDistance(Given()), FrechetDistance(Given()), KernelDistance(Given())]
    with pytest.raises(UserError, match=r"two metrics have the name Kernel\(given\)"):
        Evaluation(None, metrics, None, protocol())._row(None, "samples", iter(()), {})  # type: ignore[arg-type]


def test_the_metric_of_your_own_in_the_docs_measures_what_it_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    code = next(block for block in page.split("```python\n")[1:] if block.startswith("# mine.py")).split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    images, captions = pictures(6, 16)
    metric = names["Brightness"]()
    assert isinstance(metric, Metric) and not metric.needs_reference
    for part in (slice(0, 4), slice(4, 6)):
        metric.update(Batch(images[part], captions[part], torch.arange(6)[part]))
    value = metric.compute()["brightness"]
    assert value.value == pytest.approx(float(images.double().mean())) and value.unit == "share"
    assert value.ci_low is not None and value.ci_low < value.value
    assert set(metric.descriptions()) == {"brightness"}
