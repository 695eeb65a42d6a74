"""Images for whatever logger takes them: Lightning's own, a custom one, the wandb guest."""

from pathlib import Path

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import Logger


def log_image(logger: Logger, key: str, path: Path, step: int) -> None:
    """Gives a PNG to a logger that takes images after `step` steps; another one is left alone.

    Those are loggers with Lightning's `log_image(key, images, step)` (wandb, comet, a custom one), and those whose
    experiment is a SummaryWriter with `add_image` (tensorboard).
    """
    take = getattr(logger, "log_image", None)
    if take is not None:
        take(key=key, images=[str(path)], step=step)
        return
    add = getattr(getattr(logger, "experiment", None), "add_image", None)
    if add is not None:
        with Image.open(path) as image:
            add(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")
