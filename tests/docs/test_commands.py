"""Every command and knob in the README and in docs/ composes, so that the pages cannot fall behind the code."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ldm.commands.axes import read_axes
from ldm.commands.sample import TEXTS
from ldm.config.check import check
from ldm.config.compose import CONFIGS, compose
from ldm.config.overrides import parse, with_texts
from ldm.config.stages import stage_config
from ldm.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
COMMAND = re.compile(r"^(?:python (\w+)\.py|ldm-(\w+)) ")
LITERAL = {"train": ("data.*where", "mixed_with.*where"), "sample": TEXTS, "evaluate": ("negative_prompt",)}
EXPERIMENT = {"NAME": "quickstart"}  # placeholders of the pages
READER_MADE = "--config-dir"  # options in a folder of the reader's: tests/end_to_end/test_doors.py runs those
CHECKED = ("data", "trainer", "callbacks", "logger", "loss", "optimizer", "sampling")


def commands(page: Path) -> Iterator[str]:
    """The commands in a page's code blocks and in its inline code."""
    text = page.read_text().replace("\\\n", " ")
    lines = [
        line.strip() for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.split("\n")
    ]
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    yield from (" ".join(line.split()) for line in [*lines, *inline] if COMMAND.match(line))


def cases() -> list[Any]:
    found = dict.fromkeys((page, text) for page in PAGES for text in commands(page))
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT)}: {text}")
        for page, text in found
        if READER_MADE not in text and "[overrides]" not in text and "--help" not in text
    ]


def overrides_of(command: str) -> tuple[str, list[str]]:
    """("train", "sample" or "evaluate", overrides), placeholders filled in; of a sweep the first job's."""
    match = COMMAND.match(command)
    assert match is not None
    name = match[1] or match[2]
    words = shlex.split(command[match.end() :], comments=True)
    sweep = "-m" in words
    words = [word for word in words if word not in ("-m", "...")]
    if "--cfg" in words:
        del words[words.index("--cfg") : words.index("--cfg") + 2]
    words = [
        re.sub(r"^experiment=(\w+)$", lambda m: f"experiment={EXPERIMENT.get(m[1], m[1])}", word) for word in words
    ]
    if not sweep:
        return name, with_texts(words, LITERAL[name])
    return name, [_first_job(word) for word in words]


def _first_job(override: str) -> str:
    (parsed,) = parse([override])
    if not parsed.is_sweep_override():
        return override
    value = next(parsed.sweep_string_iterator()) if parsed.is_choice_sweep() else "1e-3"
    return f"{parsed.get_key_element()}={value}"


@pytest.mark.parametrize("command", cases())
def test_composes(command: str) -> None:
    name, overrides = overrides_of(command)
    cfg = compose(name, overrides)
    if name == "train":
        check_stages(overrides)
    elif name == "sample":
        for _, knobs in read_axes(cfg.sheet).cells():
            compose(name, [*overrides, *(f"{knob}={value}" for knob, value in knobs.items() if knob not in TEXTS)])


def check_stages(overrides: list[str]) -> None:
    """UserError for a knob that a stage of the launch refuses by its name or type."""
    given = ["run_folder=nowhere", "resume=null", *overrides]
    cfg = compose("train", given)
    for stage in cfg.stages:
        config = stage_config(cfg, stage, given)
        config.stage_folder = "nowhere"
        if OmegaConf.is_missing(config.data.train, "shards"):
            config.data.train.shards = config.data.val.shards = "nowhere"
        for group in CHECKED:
            check(config.get(group), group)


# ------------------------------------------------------------------------------------------------ knobs in the text

KNOB = re.compile(r"`([\w./@]+)=([^`\s]*)`")
PLACEHOLDER = re.compile(r"[A-Z_]+|\.\.\.|")
BASES = [
    ("train", ("experiment=quickstart",)),
    ("train", ("experiment=sd1",)),
    ("train", ("experiment=sd1", "conditioner=sdxl")),
    ("sample", ("out=x",)),
    ("evaluate", ("checkpoint=x", "out=x")),
]
SKIPPED = {
    "callbacks=[default,mine]", "callbacks=[default,show_captions]", "network=dit", "loss/auxiliary=[dispersive]",
    "callbacks.NAME=null", "callbacks.NAME.KNOB=...",  # in a folder of the reader's, or with placeholders
    "alpha=", 'unit="share"',  # arguments in Python
    "conditioner=...masked_image",
}  # fmt: skip


def knobs(page: Path) -> Iterator[tuple[str, str]]:
    """(name, value) of the `name=value` in a page's text and tables; Hydra's own and the environment's are left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for name, value in KNOB.findall(text):
        if f"{name}={value}" not in SKIPPED and not name.isupper() and not name.startswith("hydra"):
            yield name, value


def exists(name: str, value: str) -> bool:
    """Whether a command has such a knob with such a value; a value in capital letters is a placeholder."""
    if PLACEHOLDER.fullmatch(value):
        if (CONFIGS / name).is_dir():
            return True
        value = "null"
    return any(
        composes(command, (*base, *with_texts([f"{name}={value}"], LITERAL[command]))) for command, base in BASES
    )


@cache
def composes(command: str, overrides: tuple[str, ...]) -> bool:
    try:
        compose(command, overrides)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_knobs_in_the_text_exist(page: Path) -> None:
    unknown = [f"{name}={value}" for name, value in dict.fromkeys(knobs(page)) if not exists(name, value)]
    assert not unknown
