"""Makes planned pictures with a trained model, on one device or on several, and writes each one once."""

import multiprocessing
import queue
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm.commands.init_images import read_source
from ldm.commands.png_metadata import Origin, facts_of
from ldm.commands.sample_plan import Place, Planned, settings_of
from ldm.config.build import load_trained
from ldm.errors import UserError
from ldm.generation import BATCH_SIZES, Generator, Request, save_image

OnSteps = Callable[[int], object]
"""Told how many images took a step."""

SILENCE_s = 5.0  # after which the processes are asked whether they live


@dataclass(frozen=True)
class Production:
    """What is made, with which model, and where to: plain data, the same for every process.

    `batch_size` None begins with BATCH_SIZES of the device.
    """

    pictures: Sequence[Planned]
    origin: Origin
    device: str
    batch_size: int | None
    out: Path

    def batches(self) -> list[list[int]]:
        """Which pictures are made together, whatever the number of devices."""
        size = self.batch_size or BATCH_SIZES.get(torch.device(self.device).type, 16)
        groups: dict[str, list[int]] = {}
        for i, picture in enumerate(self.pictures):
            groups.setdefault(picture.group(), []).append(i)
        return [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]

    def steps(self) -> int:
        """The steps of all images together."""
        copies = [picture.place.batch_size if picture.place else 1 for picture in self.pictures]
        return sum(n * picture.steps() for n, picture in zip(copies, self.pictures, strict=True))


def produce(production: Production, devices: Sequence[str], on_steps: OnSteps) -> None:
    """Writes all pictures; several devices share the batches."""
    if len(devices) == 1:
        _make(production, production.batches(), on_steps)
        return
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    threads = max(1, torch.get_num_threads() // len(devices))
    workers = [
        context.Process(target=_work, args=(production, device, rank, len(devices), threads, told), daemon=True)
        for rank, device in enumerate(devices)
    ]
    for worker in workers:
        worker.start()
    try:
        _listen(told, workers, on_steps)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _listen(told: Any, workers: Sequence[Any], on_steps: OnSteps) -> None:
    """Passes the steps on until every process has finished; raises what one of them ran into."""
    finished = 0
    while finished < len(workers):
        try:
            kind, content = told.get(timeout=SILENCE_s)
        except queue.Empty:
            dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
            if dead:
                raise UserError(
                    f"a sampling process ended with exit status {dead[0].exitcode} (negative: killed, often for want "
                    "of memory); fewer devices or a smaller batch_size take less"
                ) from None
            continue
        if kind == "user":
            raise UserError(content)
        if kind == "error":
            raise RuntimeError(f"a sampling process failed:\n{content}")
        if kind == "finished":
            finished += 1
        else:
            on_steps(content)


def _work(production: Production, device: str, rank: int, count: int, threads: int, told: Any) -> None:
    """One of `count` processes: every count-th batch, on its device."""
    torch.set_num_threads(threads)
    try:
        own = Production(production.pictures, production.origin, device, production.batch_size, production.out)
        _make(own, production.batches()[rank::count], lambda images: told.put(("steps", images)))
        told.put(("finished", rank))
    except UserError as error:
        told.put(("user", str(error)))
    except Exception:
        told.put(("error", traceback.format_exc()))


def _make(production: Production, batches: Sequence[Sequence[int]], on_steps: OnSteps) -> None:
    if not batches:
        return
    origin = production.origin
    generator = Generator(load_trained(origin.checkpoint, origin.weights, production.device).model)
    for batch in batches:
        pictures = [production.pictures[i] for i in batch]
        for picture, image, place in _images(generator, pictures, production.batch_size, on_steps):
            save_image(image, production.out / picture.name, facts_of(picture.knobs, origin, place))


def _images(
    generator: Generator, pictures: Sequence[Planned], batch_size: int | None, on_steps: OnSteps
) -> Iterator[tuple[Planned, torch.Tensor, Place]]:
    """The images of one batch of equal settings, each with the place at which it was made."""
    knobs, settings = pictures[0].knobs, settings_of(pictures[0].knobs)
    size = (knobs["size"][0], knobs["size"][1])
    requests = [_request(picture, size) for picture in pictures]
    place = pictures[0].place
    if place is not None:  # made again at its place, beside copies of itself
        torch.set_num_threads(place.threads)
        for picture, request in zip(pictures, requests, strict=True):
            copies = [request] * place.batch_size
            images = generator.batch(copies, size, settings, partial(_tell, on_steps, place.batch_size)).cpu()
            yield picture, images[place.row], place
        return
    at = 0
    for images in generator.batches(requests, size, settings, batch_size, on_steps):
        for row, image in enumerate(images):
            yield pictures[at + row], image, Place(len(images), row, torch.get_num_threads())
        at += len(images)


def _tell(on_steps: OnSteps, images: int, done: int) -> None:
    on_steps(images)


def _request(picture: Planned, size: tuple[int, int]) -> Request:
    knobs = picture.knobs
    source = read_source(knobs["init_image"], knobs["mask"], size)
    negative = {"caption": knobs["negative_prompt"]}
    return Request({"caption": knobs["prompt"]}, knobs["seed"], negative, source.image, source.mask)
