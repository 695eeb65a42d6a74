"""Captioned shapes: a procedural text-to-image data set whose pictures can be read back exactly.

One object, "a large red circle at the upper left", or with `--relations` two, "a yellow circle below an
orange square". A tenth of the combinations, chosen by a hash of the caption, is held out of training: what a
model draws for those captions tells composition from memory. `ldm.examples.alignment` reads the pictures.

    python -m ldm.examples.shapes OUT --train 20000 --val 1000 --size 64 --seed 0 [--relations]

writes webdataset shards OUT/train, OUT/val (combinations seen in training) and OUT/held_out, and at the end
OUT/shapes.json. Image i of a split is drawn from key(seed, split, i) alone, so the bytes of every shard are a
function of the arguments. Lengths are in units of the picture's side, x to the right and y downward.
"""

import argparse
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ldm.errors import UserError, nearest
from ldm.randomness import key

Floats: TypeAlias = NDArray[np.float32]

RECIPE = 2  # goes up when the same arguments would draw other pictures

COLOURS: dict[str, tuple[int, int, int]] = {  # sRGB
    "red": (214, 36, 40),
    "orange": (255, 136, 16),
    "yellow": (250, 215, 36),
    "green": (36, 158, 60),
    "cyan": (36, 190, 212),
    "blue": (36, 76, 212),
    "purple": (128, 46, 172),
    "pink": (242, 104, 172),
}
RADII: dict[str, tuple[float, float]] = {"small": (0.14, 0.155), "large": (0.195, 0.21)}
AREAS: dict[str, float] = {  # of a shape of radius 1, see `signed_distance`
    "circle": 3.14159,
    "square": 3.24,
    "triangle": 1.57184,
    "star": 1.61642,
    "cross": 2.3616,
    "diamond": 2.42,
}
POSITIONS: dict[str, tuple[float, float]] = {  # (x, y) of the object's centre
    "at the upper left": (0.26, 0.26),
    "at the top": (0.5, 0.26),
    "at the upper right": (0.74, 0.26),
    "at the left": (0.26, 0.5),
    "in the centre": (0.5, 0.5),
    "at the right": (0.74, 0.5),
    "at the lower left": (0.26, 0.74),
    "at the bottom": (0.5, 0.74),
    "at the lower right": (0.74, 0.74),
}
RELATIONS: dict[str, tuple[int, int]] = {  # the direction (x, y) from the second object to the first
    "above": (0, -1),
    "below": (0, 1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
}
OPPOSITE = dict(zip(RELATIONS, ("below", "above", "to the right of", "to the left of"), strict=True))


@dataclass(frozen=True)
class Single:
    """One object: "a large red circle at the upper left"."""

    size: str
    colour: str
    shape: str
    position: str


@dataclass(frozen=True)
class Pair:
    """Two objects of different colours in relation: "a yellow circle below an orange square"."""

    colour: str
    shape: str
    relation: str
    other_colour: str
    other_shape: str

    def mirrored(self) -> "Pair":
        """The same picture, described from the other object: "an orange square above a yellow circle"."""
        return Pair(self.other_colour, self.other_shape, OPPOSITE[self.relation], self.colour, self.shape)


Combination: TypeAlias = Single | Pair


def singles() -> list[Single]:
    """Every combination of one object, in a fixed order."""
    return [Single(*parts) for parts in itertools.product(RADII, COLOURS, AREAS, POSITIONS)]


def pairs() -> list[Pair]:
    """Every combination of two objects of different colours, in a fixed order."""
    parts = itertools.product(COLOURS, AREAS, RELATIONS, COLOURS, AREAS)
    return [Pair(*part) for part in parts if part[0] != part[3]]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(combination: Combination) -> str:
    """The caption of a combination; `parse` is its exact inverse."""
    match combination:
        case Single(size, colour, shape, position):
            return f"a {size} {colour} {shape} {position}"
        case Pair(colour, shape, relation, other_colour, other_shape):
            other = f"{_article(other_colour)} {other_colour} {other_shape}"
            return f"{_article(colour)} {colour} {shape} {relation} {other}"


def _any_of(names: Sequence[str] | dict[str, Any]) -> str:
    return "(" + "|".join(names) + ")"


_SINGLE = re.compile(f"a {_any_of(RADII)} {_any_of(COLOURS)} {_any_of(AREAS)} {_any_of(POSITIONS)}")
_OBJECT = f"an? {_any_of(COLOURS)} {_any_of(AREAS)}"
_PAIR = re.compile(f"{_OBJECT} {_any_of(RELATIONS)} {_OBJECT}")


def parse(text: str) -> Combination:
    """The combination that a caption tells; UserError where `caption` could not have written it."""
    if found := _SINGLE.fullmatch(text):
        return Single(*found.groups())
    if found := _PAIR.fullmatch(text):
        pair = Pair(*found.groups())
        if caption(pair) == text and pair.colour != pair.other_colour:
            return pair
    raise UserError(
        f"{text!r} is not a caption of the shapes data set; write them like "
        f"{caption(singles()[0])!r} or {caption(pairs()[0])!r} ({nearest('', COLOURS)})"
    )


def held_out(combination: Combination) -> bool:
    """Whether a combination is kept out of training: one in ten, by a hash of its caption.

    A pair and its mirrored telling are the same picture, so they are held out together.
    """
    telling = caption(combination)
    if isinstance(combination, Pair):
        telling = min(telling, caption(combination.mirrored()))
    return key("held out", telling) % 10 == 0


def signed_distance(shape: str, x: Floats, y: Floats) -> Floats:
    """Signed distance (negative inside, up to corners) to the outline of a shape of radius 1 at the origin.

    The centroid is the origin and no point is farther from it than 1.28.
    """
    ax, ay = np.abs(x), np.abs(y)
    match shape:
        case "circle":
            distance: NDArray[Any] = np.hypot(x, y) - 1.0
        case "square":
            distance = np.maximum(ax, ay) - 0.9
        case "diamond":
            distance = (ax + ay - 1.1) * 0.5**0.5
        case "triangle":  # equilateral, a corner up, inscribed in a circle of radius 1.1
            distance = np.maximum(y, 0.75**0.5 * ax - 0.5 * y) - 0.55
        case "cross":
            distance = np.minimum(np.maximum(ax - 1.0, ay - 0.36), np.maximum(ax - 0.36, ay - 1.0))
        case "star":  # tips at 1.1, notches at 0.5; folded to the tenth of a turn beside a tip
            angle = np.arctan2(ax, -y)
            angle = np.abs(angle - (2 * np.pi / 5) * np.round(angle / (2 * np.pi / 5)))
            along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
            notch_x, notch_y = 0.5 * np.cos(np.pi / 5), 0.5 * np.sin(np.pi / 5)
            normal_x, normal_y = notch_y, 1.1 - notch_x
            distance = ((along - 1.1) * normal_x + across * normal_y) / np.hypot(normal_x, normal_y)
        case _:
            raise UserError(f"no shape {shape!r}: {nearest(shape, AREAS)}")
    return np.asarray(distance, dtype=np.float32)


@lru_cache(maxsize=16)
def _axis(size: int) -> Floats:
    """Centres [size] of the pixels."""
    return np.asarray((np.arange(size) + 0.5) / size, dtype=np.float32)


def coverage(shape: str, x: float, y: float, radius: float, size: int) -> Floats:
    """Antialiased coverage [size, size] in [0, 1] of a shape with its centroid at (x, y)."""
    axis = _axis(size)
    reach = 1.28 * radius + 1.0 / size
    columns = slice(*np.searchsorted(axis, (x - reach, x + reach)))
    rows = slice(*np.searchsorted(axis, (y - reach, y + reach)))
    local_x, local_y = np.meshgrid((axis[columns] - x) / radius, (axis[rows] - y) / radius)
    distance_px = signed_distance(shape, local_x, local_y) * (radius * size)
    cover = np.zeros((size, size), dtype=np.float32)
    cover[rows, columns] = np.clip(0.5 - distance_px, 0.0, 1.0)
    return np.asarray(cover, dtype=np.float32)


def _background(size: int, generator: np.random.Generator) -> Floats:
    """A pale gradient [size, size, 3] in [0, 255]."""
    pale = 242.0 + generator.uniform(-18.0, 10.0) + generator.uniform(-12.0, 12.0, 3)
    slope = generator.uniform(-8.0, 8.0, 2)
    axis = _axis(size) - 0.5
    shade = slope[0] * axis[:, None] + slope[1] * axis[None, :]
    return np.asarray(np.clip(pale + shade[..., None], 0.0, 255.0), dtype=np.float32)


def _place(combination: Combination, generator: np.random.Generator) -> list[tuple[str, str, float, float, float]]:
    """The objects of a picture: (colour, shape, x, y, radius), jittered."""
    if isinstance(combination, Single):
        x, y = np.array(POSITIONS[combination.position]) + generator.uniform(-0.03, 0.03, 2)
        radius = generator.uniform(*RADII[combination.size])
        return [(combination.colour, combination.shape, x, y, radius)]
    direction = np.array(RELATIONS[combination.relation])
    middle = 0.5 + generator.uniform(-0.08, 0.08, 2) * (1 - np.abs(direction))
    objects = []
    for side, colour, shape in (
        (1, combination.colour, combination.shape),
        (-1, combination.other_colour, combination.other_shape),
    ):
        x, y = middle + 0.24 * side * direction + generator.uniform(-0.02, 0.02, 2)
        objects.append((colour, shape, x, y, generator.uniform(0.13, 0.185)))
    return objects


def draw(combination: Combination, size: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """A picture [size, size, 3] of a combination, uint8 sRGB; the generator draws the jitter."""
    picture = _background(size, generator)
    for colour, shape, x, y, radius in _place(combination, generator):
        paint = np.clip(np.array(COLOURS[colour]) + generator.uniform(-12.0, 12.0, 3), 0.0, 255.0)
        cover = coverage(shape, x, y, radius, size)[..., None]
        picture += cover * (paint.astype(np.float32) - picture)
    return np.round(picture).astype(np.uint8)


@dataclass(frozen=True)
class Split:
    """A split of the data set: image i is a function of (seed, name, i)."""

    name: str
    combinations: Sequence[Combination]
    count: int
    size: int
    seed: int

    def combination(self, index: int) -> Combination:
        """The combination of image `index`."""
        return self.combinations[key(self.seed, self.name, index, "combination") % len(self.combinations)]

    def image(self, index: int) -> NDArray[np.uint8]:
        """Image `index`, uint8 [size, size, 3]."""
        seed = key(self.seed, self.name, index) % (1 << 64)
        return draw(self.combination(index), self.size, np.random.default_rng(seed))

    def sample(self, index: int) -> dict[str, Any]:
        """Image `index` as a webdataset sample of bytes."""
        what = self.combination(index)
        png = io.BytesIO()
        Image.fromarray(self.image(index)).save(png, format="png", compress_level=4)
        facts = {"caption": caption(what), "width": self.size, "height": self.size}
        return {
            "__key__": f"{self.name}_{index:08d}",
            "png": png.getvalue(),
            "txt": caption(what).encode(),
            "json": json.dumps(facts | {"attributes": asdict(what)}).encode(),
        }


def splits(train: int, val: int, size: int, seed: int, relations: bool) -> list[Split]:
    """The splits train, val (the combinations of train, other pictures) and held_out (as many as val)."""
    everything: Sequence[Combination] = pairs() if relations else singles()
    seen = [what for what in everything if not held_out(what)]
    unseen = [what for what in everything if held_out(what)]
    named = (("train", seen, train), ("val", seen, val), ("held_out", unseen, val))
    return [Split(name, which, count, size, seed) for name, which, count in named]


def _write_shard(path: Path, split: Split, indices: range, bar: "tqdm[Any]") -> None:
    """One shard, under its own name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as writer:
        for index in indices:
            writer.write(split.sample(index))
            bar.update()
    os.replace(unfinished, path)


def _claim(out: Path, parameters: dict[str, Any]) -> bool:
    """Whether OUT is complete already; if not, marks it as begun. UserError where it holds something else."""
    done, begun = out / "shapes.json", out / "shapes.partial.json"
    out.mkdir(parents=True, exist_ok=True)
    for record in (done, begun):
        if record.exists():
            found = json.loads(record.read_text())
            if found != parameters:
                raise UserError(f"{out} holds shapes of other parameters ({found}); give another folder or remove it")
            return record == done
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no shapes.json; give another folder")
    begun.write_text(json.dumps(parameters))
    return False


def write(
    out: Path,
    train: int,
    val: int,
    size: int = 64,
    seed: int = 0,
    relations: bool = False,
    per_shard: int = 1000,
) -> bool:
    """Write the data set to OUT, going on where an earlier run stopped; False where it was complete."""
    if min(train, val, per_shard) < 1 or size < 16:
        given = f"train={train} val={val} per_shard={per_shard} size={size}"
        raise UserError(f"shapes need train, val and per_shard of at least 1 and size of at least 16; got {given}")
    parameters = {
        "recipe": RECIPE, "train": train, "val": val, "size": size, "seed": seed,
        "relations": relations, "per_shard": per_shard,
    }  # fmt: skip
    if _claim(out, parameters):
        return False
    with tqdm(total=train + 2 * val, desc=f"shapes -> {out}", unit="img", disable=None) as bar:
        for split in splits(train, val, size, seed, relations):
            for number, start in enumerate(range(0, split.count, per_shard)):
                path = out / split.name / f"{number:05d}.tar"
                indices = range(start, min(start + per_shard, split.count))
                if path.exists():
                    bar.update(len(indices))
                else:
                    _write_shard(path, split, indices, bar)
    os.replace(out / "shapes.partial.json", out / "shapes.json")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status is 0 only where OUT is complete."""
    parser = argparse.ArgumentParser(prog="python -m ldm.examples.shapes", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=20000, help="training pictures (default %(default)s)")
    parser.add_argument("--val", type=int, default=1000, help="pictures in val and in held_out (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--relations", action="store_true", help="two objects in relation")
    parser.add_argument("--per-shard", type=int, default=1000, help="pictures in a shard (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        written = write(**vars(options))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{options.out}: {'written' if written else 'already complete, nothing to do'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
