"""How fast shards are indexed from page cache: `python -m benchmarks.data_index`.

Writes shards of small samples (a picture of a few kilobytes, a text, a JSON part as img2dataset writes it) and indexes
them several times over, by one process and by all. The pictures' bytes hardly matter: headers and JSON are read.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from ldm.data.shards.index import index_shards
from ldm.data.shards.tar import scan_shard
from ldm.data.shards.write import write_shard

LAION = 400_000_000
HEAD = bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffc0001108010001000300")


def _shard(path: Path, first: int, count: int, picture_bytes: int) -> None:
    """Samples as img2dataset writes them; the picture is a JPEG up to its frame header."""
    picture = HEAD + bytes(picture_bytes - len(HEAD))

    def samples() -> "list[tuple[str, dict[str, bytes]]]":
        made = []
        for i in range(first, first + count):
            caption = f"a photograph of the thing that has the number {i} in this benchmark"
            facts = {
                "caption": caption,
                "url": f"https://example.org/pictures/{i}.jpg",
                "key": f"{i:09d}",
                "status": "success",
                "error_message": None,
                "width": 256,
                "height": 256,
                "original_width": 640 + i % 100,
                "original_height": 480,
                "exif": "{}",
                "sha256": f"{i:064x}",
                "similarity": 0.3 + i % 7 / 100,
                "NSFW": "UNLIKELY",
            }
            parts = {"jpg": picture, "txt": caption.encode(), "json": json.dumps(facts, indent=4).encode()}
            made.append((f"{i:09d}", parts))
        return made

    write_shard(path, samples())


def _scanned(path: str) -> int:
    return len(scan_shard(path).keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--samples", type=int, default=10_000, help="of a shard")
    parser.add_argument("--picture-bytes", type=int, default=2048)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    total = options.shards * options.samples
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{number:05d}.tar" for number in range(options.shards)]
        for number, path in enumerate(paths):
            _shard(path, number * options.samples, options.samples, options.picture_bytes)
        alone, together, whole = [], [], []
        with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
            list(pool.map(_scanned, map(str, paths)))  # processes are started, files are in the page cache
            for number in range(options.rounds):
                started = time.perf_counter()
                _scanned(str(paths[0]))
                alone.append(options.samples / (time.perf_counter() - started))
                started = time.perf_counter()
                assert sum(pool.map(_scanned, map(str, paths))) == total
                together.append(total / (time.perf_counter() - started))
                started = time.perf_counter()
                manifest = index_shards(folder, folder / f"index{number}")
                whole.append(total / (time.perf_counter() - started))
        weight = sum(path.stat().st_size for path in manifest.folder.iterdir()) / total
    many = f"{options.processes} processes"
    for told, rates in (("one process", alone), (many, together), ("whole manifest, processes started anew", whole)):
        low, middle, high = statistics.quantiles(rates, n=4)
        sys.stdout.write(f"{told:<40}{middle:>10,.0f} samples/s ({low:,.0f} to {high:,.0f})\n")
    rate = statistics.median(together)
    sys.stdout.write(f"{'index':<40}{weight:>10.0f} bytes a sample, columns {', '.join(manifest.columns)}\n")
    sys.stdout.write(f"{'LAION-400M':<40}{weight * LAION / 1e9:>10.0f} GB, {LAION / rate / 3600:.1f} h at that rate\n")


if __name__ == "__main__":
    main()
