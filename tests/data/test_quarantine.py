from pathlib import Path

import pytest
import torch

from ldm.data.batch import Batch
from ldm.data.index import load_manifest
from ldm.data.quarantine import Quarantine
from ldm.errors import UserError
from tests.data.make import shards


def batch(samples: int, bad: list[tuple[int, str]]) -> Batch:
    ids = torch.zeros(samples, dtype=torch.int64)
    return Batch(torch.zeros(samples, 3, 1, 1), {}, ids, ids, 0, ids, ids, ids, samples, bad)


def test_few_bad_samples_are_counted_by_shard_and_reason(tmp_path: Path) -> None:
    quarantine = Quarantine(load_manifest(shards(tmp_path, 20)))
    quarantine.add(batch(100, [(3, "corrupt picture"), (15, "no caption"), (4, "corrupt picture")]))
    assert quarantine.seen == 100 and quarantine.bad == 3
    assert quarantine.report().splitlines()[0] == f"  {tmp_path}/00000.tar: 2 x corrupt picture"


def test_too_many_end_the_run_with_shard_and_reason(tmp_path: Path) -> None:
    quarantine = Quarantine(load_manifest(shards(tmp_path, 20)))
    for _ in range(10):
        quarantine.add(batch(4, [(12, "corrupt picture")]))
    with pytest.raises(UserError, match=r"(?s)11 of 44 .* 1.0%:.*00001.tar: 11 x corrupt picture.*max_bad"):
        quarantine.add(batch(4, [(12, "corrupt picture")]))


def test_the_share_counts_once_many_were_seen(tmp_path: Path) -> None:
    quarantine = Quarantine(load_manifest(shards(tmp_path, 20)), limit=0.01)
    quarantine.add(batch(5000, []))
    quarantine.add(batch(50, [(1, "no caption")] * 50))
    with pytest.raises(UserError, match="51 of 5051"):
        quarantine.add(batch(1, [(1, "no caption")]))
