"""What a sample command makes: each picture with all the knobs that it depends on, as plain data."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.commands.axes import COMMAND_KNOBS, NAMES, Axes, Cell, read_axes
from ldm.commands.init_images import read_init_image
from ldm.commands.prompts import Line, read_prompts
from ldm.config.check import build
from ldm.config.compose import compose
from ldm.config.overrides import parse, quoted
from ldm.config.trained import (
    SAMPLING,
    ModelInputs,
    image_size,
    merge_sampling,
    model_inputs,
    sampling_settings,
    untrained_parts,
)
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError, nearest
from ldm.first_stage.autoencoder import FirstStage
from ldm.generation import SamplingSettings
from ldm.sampling.image_to_image import steps_made

log = logging.getLogger(__name__)

Knobs = dict[str, Any]
"""What one picture depends on, the model apart; JSON."""

IMAGE_KNOBS = ("prompt", "negative_prompt", "seed", "init_image", "mask")  # may differ between the pictures of a batch
TEXTS = ("prompt", "negative_prompt", "init_image", "mask")
BATCH_KNOBS = (*SAMPLING, "strength", "size")
KNOBS = (*IMAGE_KNOBS, *BATCH_KNOBS)
STRENGTH = 0.8  # of img2img where none is given


@dataclass(frozen=True)
class Picture:
    """One picture to make; `name` is its path in the output folder, `label` its text on a sheet."""

    knobs: Knobs
    name: str
    label: str
    cell: Cell = (0, 0, 0)

    @property
    def strength(self) -> float:
        """The fraction of the steps that run: 1 without a picture to start from."""
        return 1.0 if self.knobs["init_image"] is None else float(self.knobs["strength"])

    @property
    def steps(self) -> int:
        """How many steps run."""
        return steps_made(self.knobs["steps"], self.strength)

    def settings(self) -> SamplingSettings:
        """The sampling settings that its knobs describe."""
        return sampling_settings(self.knobs, self.strength)

    def group(self) -> str:
        """Pictures of equal groups can be made in one batch."""
        present = [self.knobs[name] is not None for name in ("init_image", "mask")]
        return repr(([self.knobs[name] for name in BATCH_KNOBS], present))


def plan(
    cfg: Mapping[str, Any], overrides: Sequence[str], model: Any, recorded: Knobs | None = None
) -> tuple[list[Picture], Axes]:
    """The pictures that the command `cfg` makes, in order, and the axes of its contact sheet.

    Each combination of the axes, for each prompt, for each of its n seeds. Nothing is loaded for it; UserError for
    what the model cannot make.

    Args:
        cfg: the composed sample configuration, and `overrides` the command line that it was composed from.
        model: the model's configuration.
        recorded: the knobs of a picture to make again; what the command line does not name is as there.
    """
    axes = read_axes(cfg["sheet"])
    lines: list[tuple[str, Line]] = [("", {})]  # the knobs of each prompt, and the place that its errors name
    if cfg["prompts"] is not None:
        if cfg["prompt"] is not None:
            raise UserError('give either prompt="..." or prompts=FILE (one prompt a line, or .jsonl)')
        prompts = enumerate(read_prompts(Path(cfg["prompts"])), 1)
        lines = [(f"prompts={cfg['prompts']}, prompt {i}: ", line) for i, line in prompts]
    variants = _Variants(cfg, overrides, model, recorded, model_inputs(model), *untrained_parts(model))
    n = (1 if axes or recorded else 4) if cfg["n"] is None else cfg["n"]
    pictures = []
    for cell, texts in axes.cells():
        for number, (where, line) in enumerate(lines):
            try:
                knobs = variants.knobs(line, texts)
                count = whole_number("n", line.get("n", n))
            except UserError as error:
                raise UserError(f"{where}{error}") from error
            for seed in range(knobs["seed"], knobs["seed"] + count):
                name = f"{number:05d}_seed{seed}.png"
                if axes:
                    name = "cells/" + "".join(f"{axis}{at:02d}_" for axis, at in zip(NAMES, cell, strict=True)) + name
                more = [f"{key} {value}" for key, value in line.items() if key not in ("prompt", "seed", "n")]
                label = " · ".join([*([knobs["prompt"]] if knobs["prompt"] else []), f"seed {seed}", *more])
                pictures.append(Picture(knobs | {"seed": seed}, name, label, cell))
    return pictures, axes


@dataclass
class _Variants:
    """The command's knobs under changes of single ones; each combination of settings is composed and checked once."""

    cfg: Mapping[str, Any]
    overrides: Sequence[str]
    model: Any
    recorded: Knobs | None
    inputs: ModelInputs
    schedule: Schedule
    first_stage: FirstStage
    _settings: dict[tuple[str, ...], Knobs] = field(default_factory=dict)
    _checked: set[str] = field(default_factory=set)

    def knobs(self, line: Line, cell: Mapping[str, str]) -> Knobs:
        """All knobs of a picture: the command's, those of a line of the prompts file, those of a cell of the sheet.

        They go over those of the recorded picture, or the model's own.
        """
        for name in cell.keys() & line.keys():
            raise UserError(f"{name} is on an axis of the sheet as well; give it in one place")
        texts = {**cell} | {name: _text(name, value) for name, value in line.items() if name not in (*IMAGE_KNOBS, "n")}
        settings = tuple(f"{name}={text}" for name, text in texts.items() if name not in IMAGE_KNOBS)
        if settings not in self._settings:
            overrides = [*self.overrides, *settings]
            cfg = compose("sample", overrides) if settings else self.cfg
            given = {name: cfg.get(name) for name in KNOBS}
            defaults = self.model.get("sampling") if self.recorded is None else self.recorded
            sampling = merge_sampling(defaults, given)
            if self.recorded is not None:
                names = {override.key_or_group.split(".")[0] for override in parse(overrides)}
                given = self.recorded | {name: value for name, value in given.items() if name in names}
            self._settings[settings] = given | sampling
        values = {name: _value(name, text) for name, text in cell.items() if name in IMAGE_KNOBS}
        values |= {name: value for name, value in line.items() if name in IMAGE_KNOBS}
        return self._check(self._settings[settings] | values)

    def _check(self, knobs: Knobs) -> Knobs:
        """The knobs, complete; UserError for values that the model cannot be sampled with."""
        knobs = {name: knobs[name] for name in KNOBS}
        knobs |= {name: str(knobs[name]) for name in TEXTS if knobs[name] is not None}
        knobs["negative_prompt"] = knobs["negative_prompt"] or ""
        _check_inputs(knobs, self.inputs)
        whole_number("seed", knobs["seed"], least=None)
        steps = whole_number("steps", knobs["steps"])
        if knobs["strength"] is None and knobs["init_image"] is not None:
            knobs["strength"] = 1.0 if self.inputs.needs_image else STRENGTH
        for name in ("guidance_scale", "strength"):
            if not isinstance(knobs[name], int | float | None) or isinstance(knobs[name], bool):
                raise UserError(f"{name}={knobs[name]!r}: expected a number")
        if knobs["strength"] is not None:
            steps_made(steps, knobs["strength"])
        size = image_size(self.model, knobs["size"])
        knobs["size"] = list(size)
        key = repr([knobs[name] for name in (*BATCH_KNOBS, "init_image", "mask")])
        if key not in self._checked:
            self.first_stage.check_size(*size)
            build(knobs["grid"], "grid")(self.schedule, steps)
            for note in read_init_image(knobs["init_image"], knobs["mask"], size).notes:
                log.info(note)
            self._checked.add(key)
        return knobs


def _check_inputs(knobs: Knobs, inputs: ModelInputs) -> None:
    """Raise UserError where an input is missing that the model reads, or a text is given that it does not read."""
    if inputs.texts and knobs["prompt"] is None:
        raise UserError(
            f'prompt: not given; this model reads a text ({", ".join(inputs.texts)}): give prompt="..." or prompts=FILE'
        )
    for name in ("prompt", "negative_prompt"):
        if knobs[name] and not inputs.texts:
            raise UserError(f"{name}={knobs[name]}: this model reads no text; leave it out")
    if knobs["init_image"] is None and knobs["strength"] is not None:
        raise UserError(f"strength={knobs['strength']}: it has an effect with init_image alone; give init_image=FILE")
    if inputs.needs_image and knobs["init_image"] is None:
        raise UserError("init_image: not given; this model is shown a picture (super-resolution): give init_image=FILE")


def _value(name: str, text: str) -> Any:
    value = parse([f"{name}={text}"])[0].value()
    return value.replace("\\${", "${") if isinstance(value, str) else value


def _text(name: str, value: Any) -> str:
    """A JSON value as Hydra reads it."""
    if name.split(".")[0] in COMMAND_KNOBS:
        raise UserError(f"{name} is a knob of the whole command, not of one prompt; {nearest(name, (*KNOBS, 'n'))}")
    if isinstance(value, dict):
        raise UserError(f"{name}: expected a number, a text or a list; name what is inside as NAME.KNOB")
    if isinstance(value, list):
        return "[" + ",".join(_text(name, part) for part in value) + "]"
    return quoted(value) if isinstance(value, str) else json.dumps(value)


def whole_number(name: str, value: Any, least: int | None = 1) -> int:
    """A whole number, at least `least`; UserError for anything else."""
    if type(value) is not int:
        raise UserError(f"{name}={value!r}: expected a whole number")
    if least is not None and value < least:
        raise UserError(f"{name}={value}: expected {least} or more")
    return value
