"""Cached latents: of the sources of a training stage, computed by the first stage that it trains on.

`python -m ldm.data.cache OVERRIDES` takes the overrides of the training launch, so that what it makes is what the
launch will look for; several devices share the work. The launch itself makes what is missing.
"""

import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ldm.conditioning.conditioner import Conditioner
from ldm.config.check import build
from ldm.config.compose import compose
from ldm.config.devices import devices_of, pick_device
from ldm.config.infer import refers_to
from ldm.config.processes import launched
from ldm.config.sources import load_first_stage
from ldm.config.stages import require_resolvable, stage_config
from ldm.data.loading.cache import Encoders, ShardPartition, write_latents
from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.loading.latents import LatentRecord, summary
from ldm.data.loading.shard_source import ShardSource, Source
from ldm.data.loading.stream import StreamDataModule
from ldm.data.order.selection import Selection
from ldm.data.shards.shards import expand
from ldm.errors import UserError
from ldm.first_stage.autoencoder import FirstStage
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.module import TrainingModule

log = logging.getLogger(__name__)

VAL = "val"
BATCH_pixels = {"cuda": 1 << 23, "cpu": 1 << 19}
"""Pixels that are encoded at once."""


def use_latents(config: Any, datamodule: ShardDataModule, module: TrainingModule) -> None:
    """Lets a second stage train from cached latents where its knob `latents` says so; computes what is missing.

    Processes that torchrun or SLURM started share the work.
    """
    if config.latents is None or not isinstance(module.export_module, LatentDiffusion):
        return
    model = module.export_module
    rank, world, local = launched()
    device = pick_device("auto")
    device = torch.device("cuda", local) if device.type == "cuda" else device
    latents = _Latents(config, model.first_stage, model.conditioner, device)
    for name, source in latents.of_all(datamodule, rank, world).items():
        if name == VAL:
            datamodule.val = source
        else:
            datamodule.sources[name] = source


class _Latents:
    """Makes a stage's latents, and the states of its frozen text encoders where asked, on one device."""

    def __init__(
        self, config: Any, first_stage: FirstStage, conditioner: Conditioner | None, device: torch.device
    ) -> None:
        self.config = config
        self.fingerprint = first_stage.fingerprint()
        self.first_stage = first_stage
        self.encoders = conditioner.encoders() if conditioner is not None and config.latent_text else {}
        if config.latent_text and not self.encoders:
            raise UserError("latent_text=true: this conditioner has no frozen text encoder; give latent_text=false")
        self.device = device

    def of_all(self, datamodule: ShardDataModule, rank: int, world: int) -> dict[str, Source]:
        """The cached latents of all sources by name, VAL among them; sources that are no pictures as they are."""
        if isinstance(datamodule, StreamDataModule):
            raise UserError("latents: a stream's pictures are not found again; index the shards, or give latents=null")
        sources = datamodule.sources
        manifests = [source.manifest() for source in sources.values()]
        drawn = [getattr(source, "random_crop", False) or getattr(source, "flip", False) for source in sources.values()]
        if self.config.latent_variants > 1 and not any(drawn):
            raise UserError(
                f"latent_variants={self.config.latent_variants} would all be alike: give data.train.random_crop=true, "
                "data.train.flip=true or both"
            )
        sizes, chosen = datamodule.select(manifests)
        found = {
            name: self.of(source, manifest.fingerprint, sizes, selection, rank, world)
            for (name, source), manifest, selection in zip(sources.items(), manifests, chosen, strict=True)
        }
        if datamodule.val is not None:
            held_out = datamodule.val.manifest()
            made_of = held_out.fingerprint, *datamodule.select_val(held_out)
            found[VAL] = self.of(datamodule.val, *made_of, rank, world)
        return found

    def of(
        self,
        source: Source,
        pictures: str,
        sizes: Sequence[tuple[int, int]],
        chosen: Selection,
        rank: int,
        world: int,
    ) -> Source:
        """The cached latents of the chosen samples of a source of pictures; another source as it is.

        `pictures` is the fingerprint of its manifest.
        """
        if not isinstance(source, ShardSource):
            return source
        for size in sizes:
            self.first_stage.check_size(*size)
        drawn = source.random_crop or source.flip
        captions = [name for name, weight in (source.captions or {}).items() if weight > 0] if self.encoders else []
        record = LatentRecord(
            self.fingerprint,
            pictures,
            tuple(sizes),
            source.where,
            self.config.data.decode,
            self.config.latent_variants if drawn else 1,
            source.random_crop,
            source.flip,
            self.config.seed if drawn else 0,  # nothing else is drawn from it
            tuple(sorted(self.encoders)),
            tuple(sorted(captions)),
        )
        pixels = max(height * width for height, width in sizes)
        batch = max(1, BATCH_pixels[self.device.type] // (pixels * record.variants))
        partition = ShardPartition(rank, world, batch, self.config.data.workers, self.config.data.max_bad)
        folder = _beside(source) if self.config.latents == "auto" else Path(self.config.latents)
        parts: list[torch.nn.Module] = [self.first_stage, *self.encoders.values()]
        before = [next(part.parameters()).device for part in parts]
        for part in parts:
            part.to(self.device)
        encoders = Encoders(self._images, self._texts if self.encoders else None)
        made = write_latents(source, record, encoders, folder / record.name, partition, chosen, progress=rank == 0)
        for part, device in zip(parts, before, strict=True):
            part.to(device)
        log.info("latents: %s", summary(made.folder))
        return made

    @torch.inference_mode()
    def _images(self, images: torch.Tensor) -> torch.Tensor:
        return self.first_stage.moments(images.to(self.device, memory_format=torch.channels_last))

    @torch.inference_mode()
    def _texts(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return {name: states for encoder in self.encoders.values() for name, states in encoder.states(captions).items()}


def _beside(source: ShardSource) -> Path:
    folders = {str(Path(path).resolve().parent) for path in expand(source.shards)}
    return Path(os.path.commonpath(folders)) / ".latents"


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ldm.data.cache OVERRIDES [devices=N]`: makes the latents of all second stages of a launch."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        _command(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _command(arguments: list[str]) -> None:
    count = [text.removeprefix("devices=") for text in arguments if text.startswith("devices=")]
    overrides = [text for text in arguments if not text.startswith("devices=")]
    if count and not count[-1].isdecimal():
        raise UserError(f"devices={count[-1]}: expected a number of devices")
    devices = devices_of("auto", int(count[-1]) if count else 1)
    if len(devices) == 1:
        _share(overrides, devices[0], 0, 1)
        return
    context = multiprocessing.get_context("spawn")
    reports: Any = context.Queue()
    workers = [
        context.Process(target=_process, args=(overrides, device, rank, len(devices), reports), daemon=False)
        for rank, device in enumerate(devices)
    ]
    for worker in workers:
        worker.start()
    try:
        _await(workers, reports)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _await(workers: Sequence[Any], reports: Any) -> None:
    """Until all have finished; UserError with what one of them ran into."""
    for worker in workers:
        while worker.is_alive():
            worker.join(0.5)
            failed = [other for other in workers if other.exitcode not in (None, 0)]
            if failed:
                why = reports.get(timeout=5.0) if failed[0].exitcode == 1 else f"exit status {failed[0].exitcode}"
                raise UserError(why)


def _process(overrides: list[str], device: str, rank: int, world: int, reports: Any) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    try:
        _share(overrides, device, rank, world)
    except Exception as error:
        reports.put(str(error) if isinstance(error, UserError) else traceback.format_exc())
        raise SystemExit(1) from None


def _share(overrides: list[str], device: str, rank: int, world: int) -> None:
    """This process's share of the latents of every second stage that the launch has."""
    cfg = compose("train", overrides)
    configs = [stage_config(cfg, str(name), overrides) for name in cfg.stages]
    configs = [config for config in configs if refers_to(config, "network")]
    if not configs:
        raise UserError("stages: none of them trains on latents; give stages=[base] or the like")
    for config in configs:
        advice = "latents=auto (next to the shards) or latents=FOLDER"
        require_resolvable(
            config,
            "latents",
            f"latents: this experiment keeps them in the run's folder; give run_folder=FOLDER of the run, {advice}",
        )
        if config.latents is None:
            raise UserError(f"latents: not given; give {advice}")
        conditioner = cast(Conditioner, build(config.conditioner, "conditioner")) if config.latent_text else None
        latents = _Latents(config, load_first_stage(config), conditioner, pick_device(device))
        latents.of_all(cast(ShardDataModule, build(config.data, "data")), rank, world)
