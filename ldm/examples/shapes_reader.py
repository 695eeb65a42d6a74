"""Reads a picture of the shapes data set (`ldm.examples.shapes`) back into its objects, by image analysis.

Background: a plane per channel through the border. Objects: connected regions that differ from it in Oklab
(Ottosson 2020). Colour: the nearest named one. Shape: the template of the same area and centroid that
overlaps best. Whatever is not clearly one of the words reads as None, never as the nearest guess: an empty or
textured picture has no objects, a blob no shape, a brown object no colour.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ldm.examples.shapes import AREAS, COLOURS, POSITIONS, RADII, Floats, coverage

Mask: TypeAlias = NDArray[np.bool_]

CONTRAST = 0.07  # Oklab distance from the background beyond which a pixel belongs to an object
MIN_AREA = 0.002  # of the picture; a tenth of the smallest object. Smaller regions are noise
MAX_OBJECTS = 4  # more regions than this are a texture
MAX_COLOUR_DISTANCE = 0.085  # Oklab, from a named colour
MIN_OVERLAP = {  # intersection over union with the template; the compact shapes overlap with anything
    "circle": 0.92,
    "square": 0.85,
    "triangle": 0.8,
    "star": 0.78,
    "cross": 0.8,
    "diamond": 0.85,
}
MIN_LEAD = 0.01  # by which the best template has to lead the second
MAX_OFFSET = 0.12  # per axis, from a named position: the half distance between two
RADIUS_BETWEEN = (RADII["small"][1] * RADII["large"][0]) ** 0.5
RADIUS_RANGE = (0.8 * RADII["small"][0], 1.2 * RADII["large"][1])


@dataclass(frozen=True)
class Seen:
    """An object in a picture; None where it cannot be read. Lengths in units of the picture's side."""

    colour: str | None
    shape: str | None
    size: str | None
    position: str | None
    x: float
    y: float
    radius: float
    overlap: float  # with the best template, intersection over union


_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(srgb: NDArray[Any]) -> NDArray[np.float64]:
    """Oklab coordinates [..., 3] of sRGB in [0, 1] (Ottosson 2020, "A perceptual color space")."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((np.maximum(srgb, 0.04045) + 0.055) / 1.055) ** 2.4)
    return np.asarray(np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T, dtype=np.float64)


_NAMED_COLOURS = oklab(np.array(list(COLOURS.values())) / 255.0)


def _background(picture: Floats) -> Floats | None:
    """The plane [H, W, 3] through the border pixels, or None where the border is no plane."""
    size = len(picture)
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    design = np.stack([np.ones_like(x), x, y], axis=-1)  # [H, W, 3]
    border = np.ones((size, size), dtype=bool)
    width = max(1, size // 32)
    border[width:-width, width:-width] = False
    inlier = np.ones(int(border.sum()), dtype=bool)
    coefficients = np.zeros((3, 3))
    for _ in range(3):
        coefficients = np.linalg.lstsq(design[border][inlier], picture[border][inlier], rcond=None)[0]
        residual = np.abs(picture[border] - design[border] @ coefficients).max(axis=-1)
        inlier = residual <= max(0.02, 3.0 * float(np.median(residual)))
    if np.median(residual) > 0.08:
        return None
    return np.asarray(np.clip(design @ coefficients, 0.0, 1.0), dtype=np.float32)


def _regions(foreground: Mask) -> list[Mask]:
    """The connected regions that are large enough to be objects."""
    labels, count = ndimage.label(foreground, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return [labels == i + 1 for i in np.flatnonzero(areas >= MIN_AREA * foreground.size)]


def _paint(picture: Floats, region: Mask, contrast: NDArray[np.float64]) -> Floats:
    """The colour [3] of a region: the median of its inside, away from soft edges."""
    inside = ndimage.binary_erosion(region, iterations=2)
    if inside.sum() < 0.25 * region.sum():  # thin
        inside = region & (contrast >= np.quantile(contrast[region], 0.75))
    return np.asarray(np.median(picture[inside], axis=0), dtype=np.float32)


def _colour(paint: Floats) -> str | None:
    distances = np.linalg.norm(_NAMED_COLOURS - oklab(paint), axis=-1)
    best = int(distances.argmin())
    return list(COLOURS)[best] if distances[best] <= MAX_COLOUR_DISTANCE else None


def _shape(cover: Floats, x: float, y: float) -> tuple[str | None, float, float]:
    """The shape, its radius and its overlap with the template of the same area and centroid."""
    size = len(cover)
    overlaps = {}
    for shape, area in AREAS.items():
        radius = float((cover.sum() / area) ** 0.5) / size
        template = coverage(shape, x, y, radius, size)
        overlaps[shape] = float(np.minimum(cover, template).sum() / np.maximum(cover, template).sum())
    best, second = sorted(overlaps, key=overlaps.__getitem__, reverse=True)[:2]
    radius = float((cover.sum() / AREAS[best]) ** 0.5) / size
    clear = overlaps[best] >= MIN_OVERLAP[best] and overlaps[best] - overlaps[second] >= MIN_LEAD
    return best if clear else None, radius, overlaps[best]


def _position(x: float, y: float) -> str | None:
    for name, (at_x, at_y) in POSITIONS.items():
        if max(abs(x - at_x), abs(y - at_y)) <= MAX_OFFSET:
            return name
    return None


def _size(radius: float) -> str | None:
    if not RADIUS_RANGE[0] <= radius <= RADIUS_RANGE[1]:
        return None
    return "small" if radius < RADIUS_BETWEEN else "large"


def _object(picture: Floats, background: Floats, region: Mask, others: Mask, paint: Floats) -> Seen:
    """Reads one region. Its coverage is how far each pixel lies between the background and the paint."""
    toward = paint - background  # [H, W, 3]
    share = ((picture - background) * toward).sum(axis=-1) / np.maximum((toward**2).sum(axis=-1), 1e-6)
    near = ndimage.binary_dilation(region, iterations=max(1, len(picture) // 32)) & ~others
    cover = np.where(near, np.clip((share - 0.2) / 0.6, 0.0, 1.0), 0.0).astype(np.float32)
    axis = (np.arange(len(picture)) + 0.5) / len(picture)
    x = float((cover.sum(axis=0) * axis).sum() / cover.sum())
    y = float((cover.sum(axis=1) * axis).sum() / cover.sum())
    shape, radius, overlap = _shape(cover, x, y)
    return Seen(_colour(paint), shape, _size(radius), _position(x, y), x, y, radius, overlap)


def read(picture: NDArray[Any]) -> tuple[Seen, ...]:
    """The objects of a square picture [H, W, 3], uint8 or float in [0, 1]; () where none can be read."""
    scale = 255.0 if picture.dtype == np.uint8 else 1.0
    values = np.asarray(np.clip(picture / scale, 0.0, 1.0), dtype=np.float32)
    background = _background(values)
    if background is None:
        return ()
    contrast = np.linalg.norm(oklab(values) - oklab(background), axis=-1)
    regions = _regions(contrast > CONTRAST)
    if not 1 <= len(regions) <= MAX_OBJECTS:
        return ()
    everything = np.logical_or.reduce(regions)
    return tuple(
        _object(values, background, region, everything & ~region, _paint(values, region, contrast))
        for region in regions
    )
