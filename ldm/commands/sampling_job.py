"""The sampling job: from a composed command to pictures, made on one device or on several."""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.commands.axes import Axes, Cell
from ldm.commands.init_images import read_init_image
from ldm.commands.png_metadata import (
    Origin,
    metadata,
    origin_of,
    read_metadata,
    refuse_overwriting,
    require_same_model,
)
from ldm.commands.sample_plan import Picture, plan, whole_number
from ldm.config.devices import devices_of
from ldm.config.trained import load_trained, model_inputs, open_trained, warn_without_dropout
from ldm.errors import UserError
from ldm.evaluation.contact_sheet import contact_sheet
from ldm.evaluation.grids import labelled_grid
from ldm.generation import BATCH_SIZES, Generator, Request, open_image, save_image
from ldm.versions import versions, write_versions

MAX_ON_SHEET = 64  # pictures on a sheet without axes
MAX_LISTED = 8  # paths in the report

OnSteps = Callable[[int], object]
"""Receives how many images took a step."""


@dataclass(frozen=True)
class SamplingJob:
    """With which model pictures are made, and where they are written: plain data, the same for every process.

    `texts` are the fields that hold the prompt; `batch_size` None is that of BATCH_SIZES.
    """

    origin: Origin
    texts: tuple[str, ...]
    batch_size: int | None
    out: Path

    def batches(self, pictures: Sequence[Picture], device: str) -> list[list[Picture]]:
        """Which pictures are made together, whatever the number of devices."""
        size = self.batch_size or BATCH_SIZES.get(torch.device(device).type, 16)
        groups: dict[str, list[Picture]] = {}
        for picture in pictures:
            groups.setdefault(picture.group(), []).append(picture)
        return [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]

    def run(self, pictures: Sequence[Picture], devices: Sequence[str], on_steps: OnSteps) -> None:
        """Write all pictures; several devices share the batches. UserError where one of them cannot be made."""
        batches = self.batches(pictures, devices[0])
        if len(devices) == 1:
            for batch in batches:
                self.make(batch, devices[0], on_steps)
            return
        context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // len(devices))
        pools = [ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) for _ in devices]
        places = [i % len(devices) for i in range(len(batches))]
        jobs = {
            pools[place].submit(self.make, batch, devices[place]): sum(picture.steps for picture in batch)
            for place, batch in zip(places, batches, strict=True)
        }
        try:
            for job in as_completed(jobs):
                job.result()
                on_steps(jobs[job])
        except BrokenProcessPool as error:
            raise UserError(
                "a sampling process was killed, often because memory ran out; fewer devices or a smaller batch_size "
                "take less"
            ) from error
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)

    def make(self, batch: Sequence[Picture], device: str, on_steps: OnSteps = lambda images: None) -> None:
        """Write the pictures of one batch, which have equal settings."""
        generator = _generator(self.origin.checkpoint, self.origin.weights, device)
        height, width = batch[0].knobs["size"]
        requests = []
        for knobs in (picture.knobs for picture in batch):
            source = read_init_image(knobs["init_image"], knobs["mask"], (height, width))
            prompt, negative = ({name: str(knobs[key]) for name in self.texts} for key in ("prompt", "negative_prompt"))
            requests.append(Request(prompt, knobs["seed"], negative, source.image, source.mask))
        images = generator.generate(requests, (height, width), batch[0].settings(), self.batch_size, on_steps)
        for picture, image in zip(batch, images, strict=True):
            if not image.isfinite().all():
                raise UserError(f"{picture.name}: the picture has NaN or infinite numbers; it is not written")
            save_image(image, self.out / picture.name, metadata(picture.knobs, self.origin))


@cache  # once in a process
def _generator(checkpoint: str, weights: str, device: str) -> Generator:
    return Generator(load_trained(checkpoint, weights, device).model)


def sample(cfg: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """What was written and where, one line each; `overrides` are those that `cfg` was composed from."""
    out, recorded, checkpoint, weights = Path(cfg["out"]), None, cfg["checkpoint"], cfg["weights"]
    if cfg["from"] is not None:
        recorded, origin = read_metadata(Path(cfg["from"]))
        checkpoint = checkpoint or origin.checkpoint
        weights = weights if any(text.startswith("weights=") for text in overrides) else origin.weights
    if checkpoint is None:
        raise UserError("checkpoint: not given; give checkpoint=RUN_OR_FOLDER, or from=IMAGE.png")
    folder, config = open_trained(checkpoint)
    if recorded is not None:
        require_same_model(cfg["from"], origin, folder)
    pictures, axes = plan(cfg, overrides, config, recorded)
    if cfg["from"] is not None and Path(cfg["from"]).resolve() in [(out / one.name).resolve() for one in pictures]:
        raise UserError(f"out={out}: the picture would be written over from={cfg['from']}; give another folder")
    devices = devices_of(cfg["device"], cfg["devices"])
    origin = origin_of(folder, weights, versions())
    if not cfg["overwrite"]:
        refuse_overwriting(pictures, origin, out)
    warn_without_dropout(config, [picture.knobs["guidance_scale"] for picture in pictures])

    batch_size = None if cfg["batch_size"] == "auto" else whole_number("batch_size", cfg["batch_size"])
    job = SamplingJob(origin, model_inputs(config).texts, batch_size, out)
    with tqdm(total=sum(picture.steps for picture in pictures), unit="step", desc="sampling") as bar:
        job.run(pictures, devices, bar.update)
    write_sheet(pictures, axes, out)
    write_versions(out)
    paths = [f"{out / picture.name}\n" for picture in pictures[:MAX_LISTED]]
    more = [f"... and {len(pictures) - MAX_LISTED} more\n"] if len(pictures) > MAX_LISTED else []
    count = f"{len(pictures)} image{'s' if len(pictures) > 1 else ''}"
    return "".join([*paths, *more, f"{count} and grid.png written to {out}/\n"])


def write_sheet(pictures: Sequence[Picture], axes: Axes, out: Path) -> None:
    """Write `grid.png`: a contact sheet over the axes, else the first pictures with their labels."""
    if not axes:
        first = pictures[:MAX_ON_SHEET]
        labelled_grid([open_image(out / one.name) for one in first], [one.label for one in first], out / "grid.png")
        return
    cells: dict[Cell, list[Picture]] = {}
    for picture in pictures:
        cells.setdefault(picture.cell, []).append(picture)
    images = {cell: [open_image(out / one.name) for one in ones] for cell, ones in cells.items()}
    contact_sheet(images, axes.x.labels(), axes.y.labels(), axes.z.labels(), out / "grid.png")
