"""What a sample command makes: each picture with all the knobs that it depends on, as plain data."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.commands.axes import NAMES, Axes, axes_of, of_command
from ldm.commands.init_images import read_source
from ldm.commands.prompts import Line, read_prompts
from ldm.config.build import sampling_settings
from ldm.config.check import build, check
from ldm.config.compose import compose, parse, quoted
from ldm.data.loading.fetch import View
from ldm.errors import UserError, nearest
from ldm.generation import SamplingSettings
from ldm.sampling.grid import Grid
from ldm.sampling.image_to_image import steps_made

log = logging.getLogger(__name__)

Knobs = dict[str, Any]
"""What one picture depends on, the model apart; JSON."""

OWN = ("prompt", "negative_prompt", "seed", "init_image", "mask")  # of one picture
SETTINGS = ("steps", "guidance_scale", "strength", "size", "sampler", "grid", "guidance")  # of a batch
KNOBS = (*OWN, *SETTINGS)


@dataclass(frozen=True)
class Place:
    """Where in which batch a picture was made, by how many threads: what its last bits depend on."""

    batch_size: int
    row: int
    threads: int


@dataclass(frozen=True)
class Planned:
    """One picture to make, `name` relative to the output folder; at a `place` where its every bit counts."""

    knobs: Knobs
    name: str
    label: str
    cell: tuple[int, int, int] = (0, 0, 0)
    place: Place | None = None

    def steps(self) -> int:
        """The steps that it takes."""
        return steps_made(self.knobs["steps"], strength_of(self.knobs))

    def group(self) -> str:
        """Pictures of equal groups can be made in one batch."""
        there = [self.knobs[name] is not None for name in ("init_image", "mask")]
        return repr(([self.knobs[name] for name in SETTINGS], there, self.place))


@dataclass
class Variants:
    """The sample configuration under changes of its knobs; each combination of settings is composed once.

    With `recorded`, the knobs of a picture that was made, what the command line does not name is as there.
    """

    overrides: Sequence[str]
    recorded: Knobs | None = None
    _composed: dict[tuple[tuple[str, str], ...], Knobs] = field(default_factory=dict)

    def knobs(self, changes: Mapping[str, Any]) -> Knobs:
        """All knobs; `changes` are values of OWN, and texts of overrides of others. UserError for unknown ones."""
        settings = tuple((name, text) for name, text in changes.items() if name not in OWN)
        if settings not in self._composed:
            overrides = [*self.overrides, *(f"{name}={text}" for name, text in settings)]
            self._composed[settings] = self._compose(overrides)
        own = {name: value for name, value in changes.items() if name in OWN}
        return _checked(self._composed[settings] | own)

    def _compose(self, overrides: Sequence[str]) -> Knobs:
        cfg = compose("sample", list(overrides))
        with open_dict(cfg):
            for name in NAMES:
                del cfg.grid[name]
        knobs = {name: cfg[name] for name in OWN}
        knobs |= {name: _plain(cfg._get_node(name)) for name in SETTINGS}
        return knobs if self.recorded is None else _laid_over(self.recorded, knobs, overrides)


def _plain(node: Any) -> Any:
    """A configuration as plain types, its references kept: guidance scales refer to guidance_scale."""
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()


def _laid_over(recorded: Knobs, composed: Knobs, overrides: Sequence[str]) -> Knobs:
    """The recorded knobs, with those of the overrides in their place."""
    result = dict(recorded)
    for override in parse(list(overrides)):
        knob, _, inside = override.key_or_group.partition(".")
        if knob in KNOBS and (not inside or override.package):
            result[knob] = composed[knob]
        elif knob in KNOBS and inside not in NAMES:
            node = OmegaConf.create({knob: result[knob]})
            OmegaConf.update(node, override.key_or_group, override.value(), force_add=True)
            result[knob] = _plain(node[knob])
    return result


def _checked(knobs: Knobs) -> Knobs:
    """The knobs; UserError for values that no model could be sampled with."""
    for name in ("seed", "steps"):
        if not isinstance(knobs[name], int) or isinstance(knobs[name], bool):
            raise UserError(f"{name}={knobs[name]!r}: expected a whole number")
    for name in ("guidance_scale", "strength"):
        if not isinstance(knobs[name], int | float) or isinstance(knobs[name], bool):
            raise UserError(f"{name}={knobs[name]!r}: expected a number")
    if knobs["steps"] < 1:
        raise UserError(f"steps={knobs['steps']}: expected 1 or more")
    steps_made(knobs["steps"], knobs["strength"])
    cfg = _settings(knobs)
    for name in ("sampler", "grid", "guidance"):
        check(cfg[name], name)
    knobs["negative_prompt"] = str(knobs["negative_prompt"] or "")
    return knobs


def axis_changes(cell: Mapping[str, str]) -> dict[str, Any]:
    """The changes of a cell of a contact sheet: the texts of its overrides, the values of a picture's own knobs."""
    return {name: _value(name, text) if name in OWN else text for name, text in cell.items()}


def line_changes(line: Line) -> dict[str, Any]:
    """The changes that a line of a prompts file makes: its own knobs' values, the others' as overrides."""
    return {name: value if name in OWN else _text(name, value) for name, value in line.items() if name != "n"}


def _value(name: str, text: str) -> Any:
    value = parse([f"{name}={text}"])[0].value()
    return value.replace("\\${", "${") if isinstance(value, str) else value


def _text(name: str, value: Any) -> str:
    """A JSON value as Hydra reads it."""
    if of_command(name):
        raise UserError(f"{name} is of the whole command, not of one prompt; {nearest(name, (*KNOBS, 'n'))}")
    if isinstance(value, dict):
        raise UserError(f"{name}: expected a number, a text or a list; name what is inside as NAME.KNOB")
    if isinstance(value, list):
        return "[" + ",".join(_text(name, part) for part in value) + "]"
    if isinstance(value, str):
        return quoted(value)
    return json.dumps(value)


def plan(cfg: DictConfig, overrides: Sequence[str], recorded: Knobs | None = None) -> tuple[list[Planned], Axes]:
    """The pictures that the command makes, in order, and the axes of its contact sheet.

    Each combination of the axes, for each prompt, for each of its n seeds. UserError for what cannot be, wherever
    that shows without a model.
    """
    axes = axes_of(cfg.grid)
    variants = Variants(overrides, recorded)
    lines = _lines(cfg, axes, recorded)
    n = (1 if axes or recorded else 4) if cfg.n is None else cfg.n
    found = []
    for cell, changes in axes.cells():
        for number, (where, line) in enumerate(lines):
            try:
                knobs = variants.knobs(line_changes(line) | axis_changes(changes))
                count = _count(line.get("n", n))
            except UserError as error:
                raise UserError(f"{where}{error}") from error
            for i in range(count):
                own = knobs | {"seed": knobs["seed"] + i}
                name = f"{number:05d}_seed{own['seed']}.png"
                if axes:
                    name = "cells/" + "".join(f"{axis}{at:02d}_" for axis, at in zip(NAMES, cell, strict=True)) + name
                more = [f"{key} {value}" for key, value in line.items() if key not in ("prompt", "seed", "n")]
                label = " · ".join([own["prompt"], f"seed {own['seed']}", *more])
                found.append(Planned(own, name, label, cell))
    return found, axes


def _lines(cfg: DictConfig, axes: Axes, recorded: Knobs | None) -> list[tuple[str, Line]]:
    """The prompts' own knobs, each with the place to name in its errors."""
    by_axis = "prompt" in (axes.x.knob, axes.y.knob, axes.z.knob)
    if cfg.prompt is None and cfg.prompts is None and (by_axis or recorded):
        return [("", {})]
    lines = read_prompts(cfg.prompt, cfg.prompts)
    return [(f"prompts={cfg.prompts}, prompt {i}: " if cfg.prompts else "", line) for i, line in enumerate(lines, 1)]


def _count(n: Any) -> int:
    if not isinstance(n, int) or n < 1:
        raise UserError(f"n={n}: expected 1 or more")
    return n


def _settings(knobs: Knobs) -> DictConfig:
    return OmegaConf.create({name: knobs[name] for name in SETTINGS})


def strength_of(knobs: Knobs) -> float:
    """The strength of a picture's knobs; without a picture to begin from it is 1."""
    return 1.0 if knobs["init_image"] is None else float(knobs["strength"])


def settings_of(knobs: Knobs) -> SamplingSettings:
    """The sampling settings that a picture's knobs describe."""
    cfg = _settings(knobs)
    cfg.strength = strength_of(knobs)
    return sampling_settings(cfg, knobs["guidance_scale"])


def fitted(planned: Sequence[Planned], config: DictConfig) -> list[Planned]:
    """The pictures with their size, as the model with this configuration makes them; UserError where it cannot.

    Nothing is loaded for it: sizes, step counts and the pictures to begin from are looked at beforehand.
    """
    model = config.tasks.diffusion.latent_diffusion
    schedule = build(model.denoiser.schedule)
    with torch.device("meta"):
        first_stage = build(model.first_stage)
    seen: set[str] = set()
    result = []
    for one in planned:
        size = View.of(config.data.size if one.knobs["size"] is None else one.knobs["size"]).size
        one = replace(one, knobs=one.knobs | {"size": list(size)})
        given = repr([one.knobs[name] for name in (*SETTINGS, "init_image", "mask")])
        if given not in seen:
            first_stage.check_size(*size)
            cast(Grid, build(_settings(one.knobs).grid, "grid"))(schedule, one.knobs["steps"])
            for note in read_source(one.knobs["init_image"], one.knobs["mask"], size).notes:
                log.info(note)
            seen.add(given)
        result.append(one)
    return result
