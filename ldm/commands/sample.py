"""The command sample.py: pictures of a trained model, see docs/sample.md."""

import sys
from typing import Any

from ldm.config.command import Invocation, command

TEXTS = ("prompt", "negative_prompt", "prompts", "init_image", "mask", "from", "sheet.x", "sheet.y", "sheet.z")


@command("sample", TEXTS)
def main(cfg: Any, invocation: Invocation) -> None:
    """Write one PNG for each prompt and seed into `out`, and a labelled sheet of them all; say where they are."""
    # Imported here, so that a misspelled knob is answered before torch is loaded.
    from ldm.commands.sampling_job import sample

    sys.stdout.write(sample(cfg, invocation.overrides))
