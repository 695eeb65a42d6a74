"""The data's other rates, for `python -m benchmarks.data`: the plan, tokens of captions, cached latents."""

import json
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.conditioning.text import TextConditioner, clip_text_for
from ldm.conditioning.tokenizer import captions_tokenizer
from ldm.data.loading.batch import Batch
from ldm.data.loading.cache import Encoders, ShardPartition, write_latents
from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.loading.latents import LatentRecord, LatentSource
from ldm.data.loading.loader import StepLoader
from ldm.data.loading.shard_source import ShardSource
from ldm.data.order.plan import Plan
from ldm.data.shards.write import write_shard

SAMPLES = 400_000_000  # of the plan
WORDS = "a photograph of red mountain lake at evening two dogs running old house under tall trees beside still water"
LATENT_BATCH = 256

Clock = Callable[[], float]
Rate = Callable[[float, Clock], float]  # (seconds to measure for, what tells them) -> things a second


def _counted(step: Callable[[int], int]) -> Rate:
    """Things a second of `step`, which is given 0, 1, ... and tells how many things it did."""

    def rate(seconds: float, clock: Clock) -> float:
        began, done = clock(), 0
        for number in count():
            done += step(number)
            if (spent := clock() - began) >= seconds:
                break
        return done / spent

    return rate


def plan_rates() -> dict[str, Rate]:
    """Global batches a second of 400 million samples; a batch is its indices and epochs, every position of it."""

    def asked(global_batch: int, window: int | None) -> Rate:
        plan, positions = Plan(SAMPLES, global_batch, 0, window), np.arange(global_batch)
        block = max(1, (1 << 16) // global_batch)

        def some(number: int) -> int:
            plan.at_many(np.arange(number * block, (number + 1) * block), positions)
            return block

        return _counted(some)

    layouts = ((32, None), (32, 65536), (256, None), (2048, None))
    return {f"batches/s: plan, global batch {g}, window {w or 'all'}": asked(g, w) for g, w in layouts}


def token_rates(folder: Path) -> dict[str, Rate]:
    """Captions a second to padded ids: a batch as the conditioner does it, and one by one through transformers."""
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(WORDS.split(), rng.integers(6, 25))) for _ in range(256)]
    tokenizer = captions_tokenizer(captions, folder / "tokenizer", 2000)
    conditioner = TextConditioner(clip_text_for(tokenizer, 8, 1, 1, 8), tokenizer)

    def one_by_one(number: int) -> int:
        for caption in captions[:32]:
            tokenizer(caption, padding="max_length", truncation=True, max_length=77)
        return 32

    def batches(size: int) -> Rate:
        return _counted(lambda number: len(conditioner.tokenize(captions[:size])[0]))

    ours = {f"captions/s: tokens, batches of {size}": batches(size) for size in (32, 256)}
    return {"captions/s: tokens, transformers one by one": _counted(one_by_one), **ours}


def make_latents(folder: Path, samples: int, per_shard: int = 1000) -> LatentSource:
    """Cached latents in SD 1's shape at 256 px, of flat pictures, with a text and a JSON as img2dataset has it."""
    stored = BytesIO()
    Image.new("RGB", (256, 256), "red").save(stored, "JPEG")

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        facts = {"key": f"{number:09d}", "width": 256, "height": 256, "similarity": 0.3, "sha256": f"{number:064x}"}
        facts["url"] = f"https://example.org/pictures/{number}.jpg"
        text = f"a photograph of the thing {number}".encode()
        return f"{number:09d}", {"jpg": stored.getvalue(), "txt": text, "json": json.dumps(facts).encode()}

    for first in range(0, samples, per_shard):
        shard = folder / "pictures" / f"{first // per_shard:05d}.tar"
        write_shard(shard, map(sample, range(first, min(first + per_shard, samples))))
    source = ShardSource(str(folder / "pictures"))
    record = LatentRecord("0" * 16, source.manifest().fingerprint, ((256, 256),), decode="fast")
    encode = Encoders(lambda images: torch.randn(len(images), 2, 4, 32, 32))
    return write_latents(source, record, encode, folder / "latents", ShardPartition(batch=64), progress=False)


def latent_batches(source: LatentSource, workers: int) -> Iterator[Batch]:
    """Batches of 256 as training gets them."""
    module = ShardDataModule(source, None, 256, LATENT_BATCH, 1 << 30, workers=workers)
    module.prepare_data()
    module.setup()
    return iter(StepLoader(module.train_batches(), workers=workers))


def latent_rates(folder: Path, samples: int, workers: Sequence[int]) -> dict[str, Rate]:
    """Samples a second from cached latents, moments [256, 2, 4, 32, 32] float16 a batch."""
    source = make_latents(folder, samples)

    def rate(number: int) -> Rate:
        batches = latent_batches(source, number)

        def measured(seconds: float, clock: Clock) -> float:
            for _ in range(2 * number + 1):  # what was ready before does not count
                next(batches)
            return _counted(lambda _: len(next(batches).samples))(seconds, clock)

        return measured

    return {f"samples/s: cached latents, {n or 'no'} worker{'s' * (n > 1)}": rate(n) for n in workers}
