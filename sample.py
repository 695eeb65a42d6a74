"""Makes pictures: python sample.py checkpoint=RUN_OR_FOLDER prompt="..." out=DIR; see docs/sample.md."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tqdm import tqdm

from ldm.commands.axes import Axes
from ldm.commands.png_metadata import again, compare, origin_of, read_facts, require_same_model
from ldm.commands.sample_plan import Planned, fitted, plan
from ldm.commands.sampling_job import Production, produce
from ldm.config.build import open_trained, warn_without_dropout
from ldm.config.command import command
from ldm.config.devices import devices_of
from ldm.errors import UserError
from ldm.evaluation.contact_sheet import contact_sheet
from ldm.evaluation.grids import labelled_grid
from ldm.generation import open_image
from ldm.versions import versions

TEXTS = ("prompt", "negative_prompt", "prompts", "init_image", "mask", "from", "grid.x", "grid.y", "grid.z")
MOST = 64  # pictures on a sheet without axes


@command("sample", TEXTS)
def main(cfg: DictConfig) -> None:
    """Writes one PNG for each prompt and seed into `out`, and a labelled sheet of them all."""
    overrides, out = list(HydraConfig.get().overrides.task), Path(cfg.out)
    recorded = None if cfg["from"] is None else read_facts(Path(cfg["from"]))
    planned, axes = plan(cfg, overrides, recorded and recorded.knobs)
    checkpoint = cfg.checkpoint or (recorded and recorded.origin.checkpoint)
    if checkpoint is None:
        raise UserError("checkpoint: not given; give checkpoint=RUN_OR_FOLDER, or from=IMAGE.png")
    devices = devices_of(cfg.device, cfg.devices)
    folder, config = open_trained(checkpoint)
    planned, weights = fitted(planned, config), cfg.weights
    if recorded is not None:
        require_same_model(cfg["from"], recorded.origin, folder)
        weights = cfg.weights if any(text.startswith("weights=") for text in overrides) else recorded.origin.weights
        planned = again(planned, recorded, weights, Path(cfg["from"]))
        if any((out / picture.name).resolve() == Path(cfg["from"]).resolve() for picture in planned):
            raise UserError(f"out={out}: the picture would be written over from={cfg['from']}; give another folder")
    warn_without_dropout(config, [picture.knobs["guidance_scale"] for picture in planned])

    batch_size = None if cfg.batch_size == "auto" else cfg.batch_size
    production = Production(planned, origin_of(folder, weights, versions()), devices[0], batch_size, out)
    with tqdm(total=production.steps(), unit="step", desc="sampling") as bar:
        produce(production, devices, bar.update)
    write_sheet(planned, axes, out)
    if recorded is not None and planned[0].place is not None:
        tell_difference(Path(cfg["from"]), out / planned[0].name)


def write_sheet(planned: Sequence[Planned], axes: Axes, out: Path) -> None:
    """Writes `grid.png`: a contact sheet over the axes, else the first pictures with their labels."""
    if not axes:
        first = planned[:MOST]
        labelled_grid([open_image(out / one.name) for one in first], [one.label for one in first], out / "grid.png")
        return
    cells: dict[tuple[int, int, int], list[Planned]] = {}
    for one in planned:
        cells.setdefault(one.cell, []).append(one)
    images = {cell: [open_image(out / one.name) for one in ones] for cell, ones in cells.items()}
    contact_sheet(images, axes.x.labels(), axes.y.labels(), axes.z.labels(), out / "grid.png")


def tell_difference(before: Path, now: Path) -> None:
    """Says whether a picture that was made again is the one that it was made from."""
    sys.stdout.write(f"{now}: {compare(before, now)}\n")


if __name__ == "__main__":
    main()
