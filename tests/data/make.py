"""Small shards for the tests of the data room."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.shards.write import write_shard


def picture(seed: int, size: tuple[int, int] = (16, 16), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded picture of noise; size is (width, height)."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    stored = BytesIO()
    Image.fromarray(noise.squeeze()).save(stored, kind)
    return stored.getvalue()


def sample(number: int, size: tuple[int, int] = (16, 16)) -> tuple[str, dict[str, bytes]]:
    """The sample `number` with a picture, a text and a JSON part."""
    facts = json.dumps({"caption": f"json {number}", "width": size[0], "height": size[1]}).encode()
    return f"{number:06d}", {"png": picture(number, size), "txt": f"picture {number}".encode(), "json": facts}


def shards(folder: Path, count: int, per_shard: int = 10, size: tuple[int, int] = (16, 16)) -> str:
    """`count` samples over shards of `per_shard`; the folder, as SHARDS."""
    for number, start in enumerate(range(0, count, per_shard)):
        held = range(start, min(start + per_shard, count))
        write_shard(folder / f"{number:05d}.tar", (sample(i, size) for i in held))
    return str(folder)
