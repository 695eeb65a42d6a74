"""What the tests of refusals share."""

from pathlib import Path

import pytest

from ldm.interop.diffusers_folder import write_diffusers
from ldm.interop.single_file import write_single_file

from .tiny import package


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole single file of an SD1-shaped model, and a diffusers folder with shards."""
    folder = tmp_path_factory.mktemp("whole")
    write_single_file(package("sd1", folder), folder / "whole.safetensors")
    write_diffusers(package("sd1", folder), folder / "folder", shard_bytes=200_000)
    return folder
