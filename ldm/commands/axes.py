"""The axes of a contact sheet: knobs and the values that each takes, e.g. sheet.x="steps=10,20,50"."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from ldm.config.overrides import parse
from ldm.errors import UserError

NAMES = ("x", "y", "z")
COMMAND_KNOBS = (
    *("checkpoint", "from", "out", "overwrite", "prompts", "n", "batch_size", "weights", "device", "devices"),
    *("sheet", "hydra"),
)
"""The knobs of the whole command, which one picture cannot have its own value of."""

Cell = tuple[int, int, int]
"""(column, row, panel)."""


@dataclass(frozen=True)
class Axis:
    """One knob, as an override names it, and the texts of its values; by default an axis with a single place."""

    knob: str = ""
    values: tuple[str, ...] = ("",)

    def labels(self) -> list[str]:
        """The labels of the values, for the edge of the sheet."""
        return [f"{self.knob.split('.')[-1]} {value}".strip() for value in self.values]


@dataclass(frozen=True)
class Axes:
    """Columns, rows and panels."""

    x: Axis = Axis()
    y: Axis = Axis()
    z: Axis = Axis()

    def __bool__(self) -> bool:
        return any(axis.knob for axis in (self.x, self.y, self.z))

    def cells(self) -> Iterator[tuple[Cell, dict[str, str]]]:
        """Each place and the knobs' texts there, column by column of each row."""
        for z, y, x in product(*(enumerate(axis.values) for axis in (self.z, self.y, self.x))):
            values = {self.x.knob: x[1], self.y.knob: y[1], self.z.knob: z[1]}
            yield (x[0], y[0], z[0]), {knob: value for knob, value in values.items() if knob}


def read_axes(sheet: Mapping[str, str | None]) -> Axes:
    """The axes that `sheet.x`, `sheet.y`, `sheet.z` name; UserError where one cannot be read, or is of the command.

    A value is what Hydra takes for a sweep: `steps=10,20`, `steps=range(10,60,10)`, `size=[32,32],[48,32]`.
    """
    axes = dict.fromkeys(NAMES, Axis())
    for name in NAMES:
        if sheet[name] is None:
            continue
        text = str(sheet[name])
        if "=" not in text:
            raise UserError(
                f'sheet.{name}={text}: expected a knob and its values, e.g. sheet.{name}="guidance_scale=1,3"'
            )
        override = parse([text])[0]
        if override.key_or_group.split(".")[0] in COMMAND_KNOBS:
            raise UserError(
                f"sheet.{name}={text}: {override.key_or_group} is a knob of the whole command, not of one picture; "
                "an axis takes what changes a picture: steps, guidance_scale, sampler, grid, seed, prompt, ..."
            )
        knob = override.get_key_element()
        if any(axis.knob == knob for axis in axes.values()):
            raise UserError(f"sheet: {knob} is on two axes; give each axis another knob")
        values = override.sweep_string_iterator() if override.is_sweep_override() else [text.partition("=")[2]]
        axes[name] = Axis(knob, tuple(str(value) for value in values))
    return Axes(**axes)
