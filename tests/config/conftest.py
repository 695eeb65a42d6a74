"""A finished run that the tests of its weights share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a first stage and a base, two steps each, and its base in other formats."""
    from ldm.config.build import stages
    from ldm.config.compose import compose
    from ldm.interop.convert import convert
    from ldm.training import curriculum

    from .launch import overrides_for

    out = tmp_path_factory.mktemp("run")
    overrides = overrides_for(tiny_shapes, out, "stages=[first_stage,base]")
    curriculum.run(*stages(compose("train", overrides), overrides, out))
    for to, name in (("single_file", "base.safetensors"), ("diffusers", "diffusers"), ("ldm", "ldm")):
        convert(out / "base", out / name, to)
    return out
