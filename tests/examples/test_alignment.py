"""The reader of shapes: true pictures read true, soft ones too, and what is none of the words reads as none."""

import io
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from ldm.errors import UserError
from ldm.evaluation.metric import Batch
from ldm.examples.alignment import Alignment, agreement
from ldm.examples.shapes import Pair, Single, caption, coverage, draw, parse, splits
from ldm.examples.shapes_reader import oklab, read

Picture = NDArray[np.uint8]
BLUE, PALE = (36, 76, 212), (240, 238, 235)


@cache
def pictures(n: int, relations: bool, size: int = 64) -> tuple[list[Picture], list[str]]:
    split = splits(n, n, size, 5, relations)[0]
    return [split.image(i) for i in range(n)], [caption(split.combination(i)) for i in range(n)]


def shares(images: list[Picture], captions: list[str]) -> dict[str, float]:
    metric = Alignment()
    metric.update(batch(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255, captions))
    return {name: value.value for name, value in metric.compute().items()}


def batch(images: torch.Tensor, captions: list[str]) -> Batch:
    return Batch(images, captions, torch.arange(len(images)))


def blur(picture: Picture) -> Picture:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.8)))


def noise(picture: Picture) -> Picture:
    generator = np.random.default_rng(int(picture.sum()))
    return np.clip(picture + generator.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)


def jpeg(picture: Picture) -> Picture:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=75)
    return np.asarray(Image.open(file))


def ringing(picture: Picture) -> Picture:
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.2))).astype(float)
    return np.clip(picture + 0.5 * (picture - soft), 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("relations", [False, True])
@pytest.mark.parametrize("change", [blur, noise, jpeg, ringing])
def test_what_a_decoder_does_to_edges_changes_little(change: Callable[[Picture], Picture], relations: bool) -> None:
    images, captions = pictures(120, relations)
    assert min(shares([change(image) for image in images], captions).values()) >= 0.95


def test_pairs_read_at_32_px() -> None:
    images, captions = pictures(120, True)
    small = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX)) for image in images]
    assert min(shares(small, captions).values()) >= 0.97


def test_mismatched_pairs_are_at_chance() -> None:
    images, captions = pictures(120, True)
    found = shares(images, captions[1:] + captions[:1])
    assert found["all"] <= 0.02 and found["binding"] <= 0.05 and found["colour"] <= 0.12


def polygon(points: NDArray[np.float64]) -> Picture:
    """A blue polygon on a pale picture; the points in units of its side."""
    image = Image.new("RGB", (256, 256), PALE)
    ImageDraw.Draw(image).polygon([tuple(256 * p) for p in points], fill=BLUE)
    return np.asarray(image.resize((64, 64), Image.Resampling.BOX))


def ngon(n: int, turn: float = 0.0, stretch: float = 1.0) -> NDArray[np.float64]:
    angles = turn + np.arange(n) * 2 * np.pi / n
    return 0.5 + 0.18 * np.stack([stretch * np.cos(angles), np.sin(angles) / stretch], axis=1)


@pytest.mark.parametrize(
    "points",
    [ngon(5), ngon(60, stretch=1.25), ngon(60)[:31], ngon(4, np.pi / 4, 1.25), ngon(4, np.pi / 8), ngon(3, np.pi / 2)],
    ids=["pentagon", "ellipse", "half a circle", "rectangle", "tilted square", "triangle on its tip"],
)
def test_other_figures_are_no_shape(points: NDArray[np.float64]) -> None:
    (seen,) = read(polygon(points))
    assert seen.shape is None
    assert seen.colour == "blue" and seen.position == "in the centre"


def test_a_blend_of_two_shapes_and_a_ragged_blob_are_no_shape() -> None:
    generator = np.random.default_rng(0)
    angles = np.arange(24) * 2 * np.pi / 24
    for _ in range(20):
        radius = 0.18 * (1 + 0.25 * generator.normal(size=(24, 1)))
        points = 0.5 + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        assert all(seen.shape is None for seen in read(polygon(points)))


@pytest.mark.parametrize("colour", [(120, 90, 60), (128, 128, 128), (20, 20, 20), (170, 200, 60)])
def test_an_unnamed_colour_is_no_colour(colour: tuple[int, int, int]) -> None:
    cover = coverage("circle", 0.5, 0.5, 0.2, 64)[..., None]
    picture = (cover * np.array(colour) + (1 - cover) * 240).astype(np.uint8)
    (seen,) = read(picture)
    assert seen.colour is None and seen.shape == "circle" and seen.size == "large"


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_blank_picture_has_no_objects(value: int) -> None:
    assert read(np.full((64, 64, 3), value, dtype=np.uint8)) == ()


def test_noise_has_no_objects() -> None:
    generator = np.random.default_rng(0)
    assert read(generator.integers(0, 256, (64, 64, 3)).astype(np.uint8)) == ()


def test_a_pattern_of_many_objects_has_none() -> None:
    cover = sum(coverage("circle", x, y, 0.1, 64) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8))
    assert read((240 - 200 * np.asarray(cover)[..., None].repeat(3, axis=2)).astype(np.uint8)) == ()


def test_a_second_object_makes_a_single_caption_wrong_in_everything() -> None:
    pair, single = parse("a red circle above a blue star"), parse("a large red circle at the top")
    picture = draw(pair, 64, np.random.default_rng(0))
    assert set(agreement(single, read(picture)).values()) == {False}
    assert set(agreement(pair, read(picture)[:1]).values()) == {False}


def test_swapped_colours_keep_the_words_and_lose_the_binding() -> None:
    drawn = Pair("red", "circle", "above", "blue", "star")
    told = Pair("blue", "circle", "above", "red", "star")
    found = agreement(told, read(draw(drawn, 64, np.random.default_rng(0))))
    assert found == {"colour": True, "shape": True, "binding": False, "relation": False, "all": False}


def test_the_mirrored_telling_is_as_true() -> None:
    drawn = Pair("red", "circle", "to the left of", "blue", "star")
    seen = read(draw(drawn, 64, np.random.default_rng(0)))
    assert all(agreement(drawn.mirrored(), seen).values())
    opposite = Pair("red", "circle", "to the right of", "blue", "star")
    assert agreement(opposite, seen)["binding"] and not agreement(opposite, seen)["relation"]


@pytest.mark.parametrize("name", ["size", "colour", "shape", "position"])
def test_one_wrong_word_costs_its_attribute_alone(name: str) -> None:
    truth = Single("large", "red", "square", "at the left")
    other = Single("small", "green", "star", "at the right")
    told = Single(**{**truth.__dict__, name: getattr(other, name)})
    found = agreement(told, read(draw(truth, 64, np.random.default_rng(0))))
    assert [key for key, right in found.items() if not right] == [name, "all"]


def test_counts_add_up_over_batches_and_metrics() -> None:
    images, captions = pictures(40, False)
    mixed = captions[:20] + captions[19:39]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    whole, parts = Alignment(), [Alignment(), Alignment()]
    whole.update(batch(pixels, mixed))
    parts[0].update(batch(pixels[:13], mixed[:13]))
    parts[1].update(batch(pixels[13:], mixed[13:]))
    assert torch.equal(whole.shown, parts[0].shown + parts[1].shown)
    assert whole.named.tolist() == [40, 40, 40, 40, 0, 0, 40]
    assert whole.compute().keys() == {"colour", "shape", "size", "position", "all"}
    assert {value.unit for value in whole.compute().values()} == {"share"}


def test_pictures_and_captions_are_checked() -> None:
    with pytest.raises(UserError, match="2 pictures but 1 captions"):
        Alignment().update(batch(torch.rand(2, 3, 64, 64), ["a red circle"]))
    with pytest.raises(UserError, match="square pictures"):
        Alignment().update(batch(torch.rand(1, 3, 64, 32), ["a red circle"]))
    with pytest.raises(UserError, match="not a caption"):
        Alignment().update(batch(torch.rand(1, 3, 64, 64), ["a dog"]))


def test_oklab_of_known_colours() -> None:
    assert oklab(np.ones(3)) == pytest.approx([1.0, 0.0, 0.0], abs=1e-4)
    assert oklab(np.array([1.0, 0.0, 0.0])) == pytest.approx([0.6280, 0.2249, 0.1258], abs=1e-3)
