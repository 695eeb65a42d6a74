"""What a run was trained on, as a file in its folder and as lines of its log."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import __version__ as pillow

from ldm.data.loading.fetch import Fetcher

RECORD = "data.json"

log = logging.getLogger(__name__)


def write_record(
    folder: Path | None, sources: Mapping[str, Fetcher], sizes: Sequence[tuple[int, int]], decode: str
) -> None:
    """Writes `folder/data.json`, where there is a folder, and logs the samples that rules kept and buckets hold."""
    facts = {
        "decode": {"name": decode, "simplejpeg": simplejpeg.__version__, "pillow": pillow},
        "sizes": [list(size) for size in sizes],
        "sources": {name: _facts(fetcher) for name, fetcher in sources.items()},
    }
    for name, fetcher in sources.items():
        for rule in fetcher.selection.rules:
            log.info("%s: %s: %d kept, %d dropped", name, rule.rule, rule.kept, rule.dropped)
    if len(sizes) > 1:
        counts = np.sum([fetcher.selection.counts for fetcher in sources.values()], axis=0)
        buckets = ", ".join(f"{h}x{w}: {n}" for (h, w), n in zip(sizes, counts, strict=True))
        log.info("%d buckets (height x width: samples): %s", len(sizes), buckets)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(facts, indent=1))


def _facts(fetcher: Fetcher) -> dict[str, object]:
    return {
        "fingerprint": fetcher.manifest.fingerprint,
        "samples": len(fetcher.manifest),
        "used": len(fetcher.selection),
        "rules": [rule._asdict() for rule in fetcher.selection.rules],
        "of_each_size": fetcher.selection.counts,
        "captions": fetcher.captions.weights,
    }
