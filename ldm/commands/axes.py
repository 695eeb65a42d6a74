"""The axes of a contact sheet: knobs and the values that each takes, e.g. grid.x="steps=10,20,50"."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from omegaconf import DictConfig

from ldm.config.compose import parse
from ldm.errors import UserError

NAMES = ("x", "y", "z")
COMMAND = ("checkpoint", "from", "out", "prompts", "n", "batch_size", "weights", "device", "devices", "hydra")


@dataclass(frozen=True)
class Axis:
    """One knob, as an override names it, and the texts of its values."""

    knob: str
    values: tuple[str, ...]

    def labels(self) -> list[str]:
        """What stands beside the pictures."""
        return [f"{self.knob.split('.')[-1]} {value}".strip() for value in self.values]


NOTHING = Axis("", ("",))


@dataclass(frozen=True)
class Axes:
    """Columns, rows and panels; an axis that is not given has one place."""

    x: Axis
    y: Axis
    z: Axis

    def __bool__(self) -> bool:
        return any(axis is not NOTHING for axis in (self.x, self.y, self.z))

    def cells(self) -> Iterator[tuple[tuple[int, int, int], dict[str, str]]]:
        """Each place (column, row, panel) and the knobs' texts there, column by column of each row."""
        ranges = (range(len(axis.values)) for axis in (self.z, self.y, self.x))
        for k, j, i in product(*ranges):
            chosen = ((self.x, i), (self.y, j), (self.z, k))
            yield (i, j, k), {axis.knob: axis.values[place] for axis, place in chosen if axis is not NOTHING}


def axes_of(grid: DictConfig) -> Axes:
    """The axes that `grid.x`, `grid.y`, `grid.z` name; UserError where one cannot be read, or is of the whole command.

    A value is what Hydra takes for a sweep: `steps=10,20`, `steps=range(10,60,10)`, `size=[32,32],[48,32]`.
    """
    found = [_axis(name, grid.get(name)) for name in NAMES]
    knobs = [axis.knob for axis in found if axis is not NOTHING]
    for knob in knobs:
        if knobs.count(knob) > 1:
            raise UserError(f"grid: {knob} is on two axes; give each axis a knob of its own")
    return Axes(*found)


def _axis(name: str, given: str | None) -> Axis:
    if given is None:
        return NOTHING
    if "=" not in str(given):
        raise UserError(f'grid.{name}={given}: expected a knob and its values, e.g. grid.{name}="guidance_scale=1,3"')
    override = parse([str(given)])[0]
    if of_command(override.key_or_group):
        raise UserError(
            f"grid.{name}={given}: {override.key_or_group} is of the whole command, not of one picture; "
            "an axis takes what changes a picture: steps, guidance_scale, sampler, grid, seed, prompt, ..."
        )
    texts = list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(given).partition("=")[2]]
    return Axis(override.get_key_element(), tuple(str(text) for text in texts))


def of_command(knob: str) -> bool:
    """Whether a knob is of the whole command, so that a picture cannot have its own value of it."""
    return knob.split(".")[0] in COMMAND or knob in {f"grid.{name}" for name in NAMES}
