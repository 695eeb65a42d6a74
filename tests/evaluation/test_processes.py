"""Metrics give in two processes what they give in one (`tests/configs/test_metrics.py`: every measure)."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from ldm.evaluation.frechet import FrechetDistance, Statistics
from ldm.evaluation.kernel import KernelDistance, Points
from ldm.evaluation.reconstruction import ReconstructionQuality
from ldm.examples.alignment import Alignment
from ldm.examples.shapes import caption, splits

N = 25


def measured(indices: list[int]) -> list[float]:
    """Values and intervals over the images of these indices, and over the other processes' images."""
    split = splits(N, 1, 32, 0, False)[0]
    pictures = torch.stack([torch.from_numpy(split.image(i)) for i in indices]).permute(0, 3, 1, 2) / 255
    reference_features = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    captions = [caption(split.combination((i + i % 3) % N)) for i in indices]
    reference = Statistics(9, torch.full((3,), 0.8).double(), 0.01 * torch.eye(3).double())
    alignment, quality = Alignment(), ReconstructionQuality()
    frechet, kernel = FrechetDistance(reference, groups=5), KernelDistance(Points(reference_features))
    alignment.update(pictures, captions)
    quality.update(pictures, pictures.round())
    frechet.update(pictures.mean((2, 3)), torch.tensor(indices))
    kernel.update(pictures.mean((2, 3)))
    values = [frechet.compute(), *alignment.compute().values(), *quality.compute().values()]
    values += [kernel.compute()]
    for distance in (frechet, kernel):
        with distance.sync_context():
            values += [torch.tensor(bound) for bound in distance.interval()]
    return [float(value) for value in values]


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(measured(list(range(rank, N, 2))), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    mp.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")  # twice as fast as spawn
    alone = measured(list(range(N)))
    assert 0 < alone[1] < 1 and alone[0] > 0
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(alone, abs=1e-9)
