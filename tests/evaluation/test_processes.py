"""Metrics give in two processes what they give in one (`tests/configs/test_metrics.py`: every configuration)."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from ldm.evaluation.frechet import FrechetDistance
from ldm.evaluation.kernel import KernelDistance
from ldm.evaluation.metric import Batch
from ldm.examples.alignment import Alignment
from ldm.examples.shapes import caption, splits
from tests.evaluation.features import Given, GivenReference

N = 25


def measured(indices: list[int]) -> list[float]:
    """Values and intervals over the images of these indices, and over the other processes' images."""
    split = splits(N, 1, 32, 0, False)[0]
    pictures = torch.stack([torch.from_numpy(split.image(i)) for i in indices]).permute(0, 3, 1, 2) / 255
    captions = [caption(split.combination((i + i % 3) % N)) for i in indices]
    means = pictures.mean((2, 3))
    reference = GivenReference(torch.rand(9, 3, generator=torch.Generator().manual_seed(0)))
    alignment = Alignment()
    alignment.update(Batch(pictures, captions, torch.tensor(indices)))
    values = [alignment.compute()]
    for distance in (FrechetDistance(Given(), groups=5), KernelDistance(Given())):
        distance.set_reference(reference)
        distance.update(Batch(means, captions, torch.tensor(indices)))
        values.append(distance.compute())
    return [float(number) for part in values for value in part.values() for number in value[:3]]


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(measured(list(range(rank, N, 2))), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    mp.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")  # twice as fast as spawn
    alone = measured(list(range(N)))
    assert 0 < alone[0] < 1 and alone[-1] > 0
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(alone, abs=1e-9)
