"""An evaluation: the pictures of a model, of its first stage and of the data themselves, measured alike."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.loading.fetch import Fetcher, View
from ldm.data.shards.index import load_manifest
from ldm.data.shards.shards import Shards
from ldm.evaluation.features import Features, reference_features
from ldm.evaluation.measures import Batch, Measure
from ldm.evaluation.protocol import Protocol, Result, Value, digest
from ldm.evaluation.reconstruction import psnr
from ldm.generation import Generator, Request, SamplingSettings

BATCH = 32
EXAMPLES = 32


class ReferenceSet:
    """The first n pictures of some shards at the evaluated size, and their captions; the captions are the prompts.

    Their features are kept in the folder `cache` (None: not).
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
        self.captions = [self._fetcher.caption(index) for index in range(self.n)]
        self._cache = cache
        self._features: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[Tensor]:
        """The pictures, [B, 3, H, W] in [0, 1]."""
        for first in range(0, self.n, BATCH):
            found = [self._fetcher.fetch_or_substitute(index)[0] for index in range(first, min(first + BATCH, self.n))]
            yield torch.stack([sample.image for sample in found]) * 0.5 + 0.5

    def features(self, network: Features) -> Tensor:
        """The features [n, D] of the pictures, extracted once for each network."""
        if network.description not in self._features:
            found = reference_features(self, network, self._cache, self.fingerprint)
            self._features[network.description] = found
        return self._features[network.description]


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
    measures         what is measured
    settings         the sampling settings at a guidance scale
    protocol         what the results have in common; the rest is filled in for each row
    seed             image i of a set has seed + i
    """

    generator: Generator
    measures: Sequence[Measure]
    settings: Callable[[float], SamplingSettings]
    protocol: Protocol
    seed: int = 0
    batch_size: int = 64
    negative_prompt: str = ""

    def run(self, sets: Sequence[ReferenceSet], scales: Sequence[float]) -> Iterator[Row]:
        """Rows for the sets: the pictures themselves, their reconstructions, samples at each scale."""
        for reference in sets:
            yield self._row(reference, "pictures", reference, {}, others=False)
            yield self._reconstructions(reference)
            for scale in scales:
                yield self.samples(reference, scale)

    @torch.inference_mode()
    def _reconstructions(self, reference: ReferenceSet) -> Row:
        first_stage = self.generator.first_stage
        ratios: list[Tensor] = []

        def made() -> Iterator[Tensor]:
            for images in reference:
                images = images.to(first_stage.last_layer.device)
                decoded = first_stage.decode(first_stage.encode(images * 2 - 1)).float()
                decoded = (decoded * 0.5 + 0.5).clamp(0, 1)
                ratios.append(psnr(decoded, images).cpu())
                yield decoded.cpu()

        row = self._row(reference, "reconstructions", made(), {})
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

        def made() -> Iterator[Tensor]:
            name = f"{reference.name}, guidance {scale:g}"
            with tqdm(total=len(requests) * settings.steps, unit="step", desc=name, leave=False) as bar:
                images = self.generator.generate(requests, reference.size, settings, self.batch_size, bar.update)
                for batch in _batches(images):
                    yield torch.stack(batch)

        facts = {"guidance_scale": scale, "steps": settings.steps}
        return self._row(reference, "samples", made(), facts)

    def _row(
        self,
        reference: ReferenceSet,
        source: str,
        batches: "ReferenceSet | Iterator[Tensor]",
        facts: Mapping[str, float],
        others: bool = True,
    ) -> Row:
        measures = [measure for measure in self.measures if others or not measure.needs_reference]
        for measure in measures:
            measure.begin(reference)
        position, examples = 0, []
        for images in batches:
            examples += list(images[: max(0, EXAMPLES - position)])
            batch = Batch(images, reference.captions[position : position + len(images)], position)
            position += len(images)
            for measure in measures:
                measure.update(batch)
        values = {name: value for measure in measures for name, value in measure.values().items()}
        protocol = replace(
            self.protocol,
            task={"samples": "text_to_image"}.get(source, source),
            reference=reference.fingerprint,
            prompts=digest(reference.captions),
            metrics={name: told for measure in measures for name, told in measure.descriptions().items()},
            n_images=reference.n,
            **facts,  # type: ignore[arg-type]
        )
        captions = reference.captions[: len(examples)]
        return Row(reference.name, source, Result(protocol, values), captions, torch.stack(examples))


def _batches(images: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    """The images in lists of BATCH."""
    batch: list[Tensor] = []
    for image in images:
        batch.append(image)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
