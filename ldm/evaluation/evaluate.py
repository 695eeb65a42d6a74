"""An evaluation: the pictures of a model, of its first stage and of the data themselves, measured alike."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.loading.fetch import Fetcher, View
from ldm.data.shards.index import load_manifest
from ldm.data.shards.picture import BadSample
from ldm.data.shards.shards import Shards
from ldm.errors import UserError
from ldm.evaluation.features import Features, reference_features
from ldm.evaluation.metric import Batch, Metric
from ldm.evaluation.protocol import Protocol, Result, Value, digest
from ldm.evaluation.reconstruction import psnr
from ldm.generation import Generator, Request, SamplingSettings

BATCH = 32
EXAMPLES = 32
T = TypeVar("T")


class ReferenceSet:
    """The first n pictures of some shards at the evaluated size, and their captions, which are the prompts.

    Their features are kept in the folder `cache` (None: not). UserError for a picture or a caption that cannot be used:
    a substitute would be measured with another caption.
    """

    def __init__(
        self, name: str, shards: Shards, size: tuple[int, int], n: int, cache: str | Path | None = None
    ) -> None:
        manifest = load_manifest(shards)
        self.name = name
        self.size = size
        self.n = min(n, len(manifest))
        self.fingerprint = f"{manifest.fingerprint}, first {self.n}, {size[0]}x{size[1]} centre crop"
        self._fetcher = Fetcher(manifest, View.of(size))
        self.captions = [self._usable(self._fetcher.caption, index) for index in range(self.n)]
        self._cache = cache
        self._features: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[Tensor]:
        """The pictures, [B, 3, H, W] in [0, 1]."""
        for first in range(0, self.n, BATCH):
            indices = range(first, min(first + BATCH, self.n))
            yield torch.stack([self._usable(self._fetcher, index).image for index in indices]) * 0.5 + 0.5

    def features(self, network: Features) -> Tensor:
        """The features [n, D] of the pictures on the CPU, extracted once for each network."""
        if network.description not in self._features:
            features = reference_features(self, network, self._cache, self.fingerprint)
            self._features[network.description] = features
        return self._features[network.description]

    def _usable(self, fetch: Callable[[int], T], index: int) -> T:
        """What `fetch` gives for a sample; UserError that names the sample where it cannot be used."""
        try:
            return fetch(index)
        except BadSample as error:
            manifest = self._fetcher.manifest
            where = f"{self.name}: {manifest.key(index)} in {manifest.shard_of(index)}"
            raise UserError(f"{where} cannot be evaluated on ({error}); repack the set without it") from error


@dataclass(frozen=True)
class Row:
    """The result of one source of pictures ("pictures", "reconstructions", "samples") on one reference set."""

    set_name: str
    source: str
    result: Result
    captions: Sequence[str]
    examples: Tensor  # the first pictures, [up to EXAMPLES, 3, H, W] in [0, 1]


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated and how; `run` yields a row for each set and source.

    generator        the model
    metrics          what is measured
    settings         the sampling settings at a guidance scale
    protocol         what the results have in common; the rest is filled in for each row
    seed             image i of a set has seed + i
    """

    generator: Generator
    metrics: Sequence[Metric]
    settings: Callable[[float], SamplingSettings]
    protocol: Protocol
    seed: int = 0
    batch_size: int = 64
    negative_prompt: str = ""

    def run(self, sets: Sequence[ReferenceSet], scales: Sequence[float]) -> Iterator[Row]:
        """Rows for the sets: the pictures themselves, their reconstructions, samples at each scale."""
        for reference in sets:
            yield self._row(reference, "pictures", reference, {}, compared=False)
            yield self._reconstructions(reference)
            for scale in scales:
                yield self.samples(reference, scale)

    @torch.inference_mode()
    def _reconstructions(self, reference: ReferenceSet) -> Row:
        first_stage = self.generator.first_stage
        ratios: list[Tensor] = []

        def decoded_batches() -> Iterator[Tensor]:
            for images in reference:
                images = images.to(first_stage.last_layer.device)
                decoded = first_stage.decode(first_stage.encode(images * 2 - 1)).float()
                decoded = (decoded * 0.5 + 0.5).clamp(0, 1)
                ratios.append(psnr(decoded, images).cpu())
                yield decoded.cpu()

        row = self._row(reference, "reconstructions", decoded_batches(), {})
        values = torch.cat(ratios)
        half = 1.96 * float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
        mean = float(values.mean())
        metrics = {"psnr_db": Value(mean, mean - half, mean + half), **row.result.metrics}
        return replace(row, result=Result(row.result.protocol, metrics))

    def samples(self, reference: ReferenceSet, scale: float) -> Row:
        """The row of the samples for the captions of a set at a guidance scale."""
        settings = self.settings(scale)
        requests = [
            Request({"caption": caption}, self.seed + i, {"caption": self.negative_prompt})
            for i, caption in enumerate(reference.captions)
        ]

        def sampled_batches() -> Iterator[Tensor]:
            name = f"{reference.name}, guidance {scale:g}"
            with tqdm(total=len(requests) * settings.steps, unit="step", desc=name, leave=False) as bar:
                images = self.generator.generate(requests, reference.size, settings, self.batch_size, bar.update)
                while batch := list(islice(images, BATCH)):
                    yield torch.stack(batch)

        facts = {"guidance_scale": scale, "steps": settings.steps}
        return self._row(reference, "samples", sampled_batches(), facts)

    def _row(
        self,
        reference: ReferenceSet,
        source: str,
        batches: ReferenceSet | Iterator[Tensor],
        facts: Mapping[str, float],
        compared: bool = True,
    ) -> Row:
        """The row of a source; `compared` with the reference, or without the metrics that need one."""
        metrics = [metric for metric in self.metrics if compared or not metric.needs_reference]
        descriptions = _joined([metric.descriptions() for metric in metrics])
        for metric in metrics:
            metric.reset()
            if metric.needs_reference:
                metric.set_reference(reference)
        position, examples = 0, []
        for images in batches:
            examples += list(images[: max(0, EXAMPLES - position)])
            captions = reference.captions[position : position + len(images)]
            batch = Batch(images, captions, torch.arange(position, position + len(images)))
            position += len(images)
            for metric in metrics:
                metric.update(batch)
        protocol = replace(
            self.protocol,
            task={"samples": "text_to_image"}.get(source, source),
            reference=reference.fingerprint,
            prompts=digest(reference.captions),
            metrics=descriptions,
            n_images=reference.n,
            **facts,  # type: ignore[arg-type]
        )
        result = Result(protocol, _joined([metric.compute() for metric in metrics]))
        return Row(reference.name, source, result, reference.captions[: len(examples)], torch.stack(examples))


def _joined(parts: Sequence[Mapping[str, T]]) -> dict[str, T]:
    """One mapping of all; UserError where two metrics use the same name, of which one value would be lost."""
    names = [name for part in parts for name in part]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two metrics have the name {twice[0]}: measure them one at a time, or rename one of them")
    return {name: value for part in parts for name, value in part.items()}
