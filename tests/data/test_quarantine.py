import json
from pathlib import Path

import pytest
import torch

from ldm.data.loading.batch import Batch
from ldm.data.loading.quarantine import Quarantine
from ldm.data.shards.index import load_manifest
from ldm.errors import UserError
from tests.data.make import shards


def batch(samples: int, bad: list[tuple[int, str]]) -> Batch:
    ids = torch.zeros(samples, dtype=torch.int64)
    return Batch(torch.zeros(samples, 3, 1, 1), {}, ids, ids, 0, ids, ids, ids, samples, bad=bad)


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


def test_each_bad_sample_is_listed_once_also_over_a_resume(tmp_path: Path) -> None:
    manifest, file = load_manifest(shards(tmp_path / "s", 20)), tmp_path / "stage" / "quarantine.jsonl"
    told = [(3, "corrupt picture"), (15, "no caption"), (3, "corrupt picture")]
    Quarantine(manifest, file=file).add(batch(100, told))
    with file.open("a") as cut:
        cut.write('{"shard": "x", "ke')  # killed
    Quarantine(manifest, file=file).add(batch(100, told))
    lines = file.read_text().splitlines()
    assert [json.loads(line) for line in lines[:2]] == [
        {"shard": f"{tmp_path}/s/00000.tar", "key": "000003", "reason": "corrupt picture", "step": 0},
        {"shard": f"{tmp_path}/s/00001.tar", "key": "000015", "reason": "no caption", "step": 0},
    ]
    assert len(lines) == 3


def test_a_shard_of_which_more_than_5_percent_are_bad_ends_the_run(tmp_path: Path) -> None:
    """Different samples count, above a minimum; visits do not."""
    manifest = load_manifest(shards(tmp_path, 40, per_shard=40))
    quarantine = Quarantine(manifest, limit=0.9, minimum=3)
    quarantine.add(batch(1000, [(1, "no caption"), (2, "no caption"), (3, "corrupt picture"), (1, "no caption")]))
    quarantine.add(batch(1000, [(2, "no caption")] * 5))
    with pytest.raises(UserError, match=r"4 of the 40 samples of .*00000.tar could not be used, more than 5.0%"):
        quarantine.add(batch(1000, [(4, "no caption")]))
    assert Quarantine(manifest, limit=0.9, minimum=3, of_shard=0.1).add(batch(9, [(i, "x") for i in range(4)])) is None


def test_samples_of_several_sources_are_numbered_one_after_the_other(tmp_path: Path) -> None:
    both = [load_manifest(shards(tmp_path / "a", 20)), load_manifest(shards(tmp_path / "b", 20))]
    quarantine = Quarantine(both)
    quarantine.add(batch(100, [(19, "no caption"), (20, "no caption"), (39, "no caption")]))
    assert [shard for shard, _ in quarantine.counts] == [
        f"{tmp_path}/a/00001.tar",
        f"{tmp_path}/b/00000.tar",
        f"{tmp_path}/b/00001.tar",
    ]
