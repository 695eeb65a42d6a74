"""Shards to batches beside webdataset's pipeline, in one process and interleaved: `python -m benchmarks.data`.

The shards hold synthetic pictures of photographs' spectrum, 512 to 1024 px and 120 to 450 KB, JPEG 4:2:0. Everyone
makes float32 batches of 32 in [-1, 1], 256 px, shorter side resized and centre crop. A rate is images a second while
the contender runs alone; what its workers had ready before is not counted. Rounds are interleaved; medians, quartiles.

Also, in the same rounds: global batches of the plan (65,536 positions are asked for at once), tokens of captions, and
samples from cached latents, all a second. `--only` leaves out the pictures or these.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.data_rates import Clock, Rate, latent_rates, plan_rates, token_rates
from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.loading.decode import DECODERS, cover_size
from ldm.data.loading.fetch import as_images
from ldm.data.loading.loader import StepLoader
from ldm.data.loading.shard_source import ShardSource
from ldm.data.shards.index import load_manifest
from ldm.data.shards.write import write_shard

SIZE, BATCH = 256, 32
SIDES = (512, 640, 768, 896, 1024)
Batches = Iterator[Any]


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of noise whose amplitude falls as 1 / frequency, of 120 to 450 KB where the quality allows it."""
    frequency = np.hypot(np.fft.rfftfreq(width)[None], np.fft.fftfreq(height)[:, None])
    fall = 1 / (frequency + 1 / max(width, height)) ** 1.1
    grey, *colours = (np.fft.irfft2(fall * np.fft.rfft2(rng.normal(size=(height, width)))) for _ in range(4))
    bands = [grey + 0.3 * colour for colour in colours]
    pixels = np.stack([(b - b.mean()) / b.std() * 45 + 128 for b in bands], -1).clip(0, 255).astype(np.uint8)
    for quality in (92, 85, 75, 60, 45, 30):
        stored = BytesIO()
        Image.fromarray(pixels).save(stored, "JPEG", quality=quality)
        if len(stored.getvalue()) < 450_000:
            break
    return stored.getvalue()


def make_shards(folder: Path, pictures: int, per_shard: int = 50) -> list[bytes]:
    """Writes the shards and returns the pictures."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(pictures):
        long, short = sorted(rng.choice(SIDES, 2).tolist(), reverse=True)
        made.append(photograph(rng, *((long, short) if i % 2 else (short, long))))
        progress(f"picture {i + 1} of {pictures}")
    for start in range(0, pictures, per_shard):
        held = enumerate(made[start : start + per_shard], start)
        samples = ((f"{i:06d}", {"jpg": data, "txt": f"picture {i}".encode()}) for i, data in held)
        write_shard(folder / f"{start // per_shard:05d}.tar", samples)
    return made


def progress(told: str) -> None:
    sys.stderr.write(f"\r{told:<70}")
    sys.stderr.flush()


def centre(pixels: np.ndarray) -> np.ndarray:
    top, left = (pixels.shape[0] - SIZE) // 2, (pixels.shape[1] - SIZE) // 2
    return pixels[top : top + SIZE, left : left + SIZE]


def with_pillow(data: bytes) -> np.ndarray:
    """Decoded whole, resized by Lanczos."""
    image = Image.open(BytesIO(data)).convert("RGB")
    height, width = cover_size((image.height, image.width), (SIZE, SIZE))
    return centre(np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)))


def with_simplejpeg(data: bytes) -> np.ndarray:
    """Decoded at reduced scale, resized by Pillow's bilinear filter."""
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=SIZE, min_width=SIZE)
    height, width = cover_size(pixels.shape[:2], (SIZE, SIZE))
    return centre(np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)))


def to_sample(decode: Callable[[bytes], np.ndarray], sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
    return as_images(decode(sample["jpg"])[None])[0], sample["txt"].decode()


class ToSample:
    """What webdataset maps over its samples; it is sent to workers."""

    def __init__(self, decode: Callable[[bytes], np.ndarray]) -> None:
        self.decode = decode

    def __call__(self, sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
        return to_sample(self.decode, sample)


def webdataset_batches(folder: Path, decode: Callable[[bytes], np.ndarray], workers: int) -> Batches:
    shards = sorted(map(str, folder.glob("*.tar")))
    data = wds.WebDataset(shards, resampled=True, shardshuffle=False, nodesplitter=None).shuffle(200)
    return iter(DataLoader(data.map(ToSample(decode)).batched(BATCH), batch_size=None, num_workers=workers))


def our_batches(folder: Path, decode: str, workers: int, threads: int) -> Batches:
    source = ShardSource(str(folder))
    module = ShardDataModule(source, None, SIZE, BATCH, 1 << 30, workers=workers, threads=threads, decode=decode)
    module.prepare_data()
    module.setup()
    return iter(StepLoader(module.train_batches(), workers=workers))


def decoded(pictures: list[bytes], decode: Callable[[bytes], np.ndarray], threads: int) -> Batches:
    """Decoding, resizing and cropping alone, from memory."""
    endless = cycle(pictures)
    with ThreadPoolExecutor(threads) as pool:
        while True:
            wanted = list(islice(endless, BATCH))
            yield list(pool.map(decode, wanted)) if threads > 1 else [decode(data) for data in wanted]


def by_name(name: str) -> Callable[[bytes], np.ndarray]:
    decode = DECODERS[name]
    return lambda data: centre(decode(data, (SIZE, SIZE))[0])


def rate(batches: Batches, ready: int) -> Rate:
    """Images a second; the first `ready` batches may have been made before."""

    def measured(seconds: float, clock: Clock) -> float:
        for _ in range(ready):
            next(batches)
        began, count = clock(), 0
        while count == 0 or clock() - began < seconds:
            next(batches)
            count += BATCH
        return count / (clock() - began)

    return measured


def alone(folder: Path, pictures: list[bytes]) -> dict[str, tuple[Batches, int]]:
    """The batches of those that work in this thread, and how many each may have made before it is asked."""
    return {
        "webdataset + Pillow, no worker": (webdataset_batches(folder, with_pillow, 0), 1),
        "webdataset + simplejpeg reduced, no worker": (webdataset_batches(folder, with_simplejpeg, 0), 1),
        "decoding alone, Pillow": (decoded(pictures, with_pillow, 1), 0),
        "decoding alone, exact": (decoded(pictures, by_name("exact"), 1), 0),
        "decoding alone, fast": (decoded(pictures, by_name("fast"), 1), 0),
        "ours, exact, no worker": (our_batches(folder, "exact", 0, 0), 1),
        "ours, fast, no worker": (our_batches(folder, "fast", 0, 0), 1),
    }


def together(folder: Path, pictures: list[bytes]) -> dict[str, tuple[Batches, int]]:
    """The same of those that have several threads or processes."""
    return {
        "webdataset + Pillow, 2 workers": (webdataset_batches(folder, with_pillow, 2), 5),
        "webdataset + simplejpeg reduced, 2 workers": (webdataset_batches(folder, with_simplejpeg, 2), 5),
        "decoding alone, fast, 2 threads": (decoded(pictures, by_name("fast"), 2), 0),
        "decoding alone, exact, 2 threads": (decoded(pictures, by_name("exact"), 2), 0),
        "ours, fast, 2 threads": (our_batches(folder, "fast", 0, 2), 3),
        "ours, fast, 2 workers": (our_batches(folder, "fast", 2, 0), 5),
        "ours, exact, 2 threads": (our_batches(folder, "exact", 0, 2), 3),
        "ours, exact, 2 workers": (our_batches(folder, "exact", 2, 0), 5),
    }


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:>12,.0f}   ({low:,.0f} to {high:,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each contender in each round")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--latents", type=int, default=8000, help="samples of cached latents")
    parser.add_argument("--only", choices=("pictures", "rates"))
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process's own, on a busy machine")
    options = parser.parse_args()
    clock: Clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "shards")
        everyone: dict[str, Rate] = {}
        if options.only != "rates":
            pictures = make_shards(folder, options.pictures)
            load_manifest(str(folder))
            found = alone(folder, pictures) | ({} if options.cpu_time else together(folder, pictures))
            everyone |= {f"images/s: {who}": rate(*each) for who, each in found.items()}
        if options.only != "pictures":
            progress("latents")
            workers = [0] if options.cpu_time else [0, 1, 2]
            everyone |= plan_rates() | token_rates(Path(name)) | latent_rates(Path(name), options.latents, workers)
        rates: dict[str, list[float]] = {}
        for number in range(options.rounds):
            for who, measure in everyone.items():
                progress(f"round {number + 1} of {options.rounds}: {who}")
                rates.setdefault(who, []).append(measure(options.seconds, clock))
        progress("")
    if options.only != "rates":
        sizes = [len(data) / 1000 for data in pictures]
        sys.stdout.write(f"\n{len(pictures)} JPEGs, {min(sizes):.0f} to {max(sizes):.0f} KB\n")
    for who, values in rates.items():
        sys.stdout.write(f"{who:<62}{quartiles(values)}\n")


if __name__ == "__main__":
    main()
