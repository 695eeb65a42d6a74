"""SDXL's sizes and crops on their way from the shards to the condition, from pictures and from cached latents."""

from pathlib import Path

import pytest
import torch

from ldm.conditioning.compose import Compose
from ldm.conditioning.micro import MicroConditioner
from ldm.data.loading.cache import Encoders, ShardPartition, write_latents
from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.loading.latents import LatentRecord
from ldm.data.loading.shard_source import ShardSource, Source
from ldm.training.diffusion import condition_fields
from tests.data.make import shards


def latents(source: ShardSource, out: Path) -> Source:
    """Four crops of each picture, cached."""
    fingerprint = source.manifest().fingerprint
    record = LatentRecord("a", fingerprint, ((16, 16),), variants=4, random_crop=True)
    encode = Encoders(lambda images: torch.zeros(len(images), 2, 4, 2, 2))
    return write_latents(source, record, encode, out, ShardPartition(), progress=False)


@pytest.mark.parametrize("cached", [False, True])
def test_sizes_and_crops_of_a_batch_are_the_numbers_of_its_condition(tmp_path: Path, cached: bool) -> None:
    source = ShardSource(shards(tmp_path / "s", 12, size=(40, 24)), random_crop=True)
    data = ShardDataModule(latents(source, tmp_path / "l") if cached else source, None, 16, 6, total_steps=3)
    data.setup()
    batch = data.train_batches()[1]
    fields = ("original_size", "crop", "target_size")
    conditioner = Compose([MicroConditioner(field, [1024, 1024]) for field in fields])
    found = conditioner(condition_fields(batch)).vector
    numbers = torch.cat([torch.tensor([[24, 40]] * 6), batch.crop, torch.tensor([[16, 16]] * 6)], dim=1)
    wanted = MicroConditioner("numbers", [0] * 6)({"numbers": numbers}).vector
    assert found is not None and wanted is not None and torch.equal(found, wanted)
    assert len({tuple(crop) for crop in batch.crop.tolist()}) > 2 and batch.crop.max() <= 27 - 16
