"""Writing a shard: samples into one tar file, which appears under its name only when it is complete."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from ldm.checkpoint import write_atomic


def write_shard(path: str | Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Writes (key, {extension: bytes}) samples as one tar file and returns how many there were.

    The same samples give the same bytes: no times, no owners, members in order.
    """
    count = 0
    with write_atomic(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, parts in samples:
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            count += 1
    return count
