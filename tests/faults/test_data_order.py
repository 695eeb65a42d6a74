"""The order of samples through interruptions, numbers of ranks and workers, bad samples and bad settings."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.loading.fetch import Fetcher, View
from ldm.data.loading.loader import StepLoader
from ldm.data.loading.shard_source import ShardSource
from ldm.data.order.buckets import AspectRatios, Sizes
from ldm.data.shards.index import load_manifest
from ldm.data.shards.write import write_shard
from ldm.errors import UserError

SIDES = [(16, 16), (32, 8), (8, 32), (24, 12)]  # width, height
STEPS = 60


def jpeg(seed: int, width: int, height: int) -> bytes:
    data = BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, "JPEG")
    return data.getvalue()


def sample(i: int, **changed: bytes) -> tuple[str, dict[str, bytes]]:
    """Pictures of four shapes, sorted by none; `score` rises with the number."""
    width, height = SIDES[i * 7 % 4]
    facts = json.dumps({"width": width, "height": height, "score": i, "alt": f"other {i}"}).encode()
    return f"{i:05d}", {"jpg": jpeg(i, width, height), "txt": f"text {i}".encode(), "json": facts} | changed


def shards(folder: Path, count: int = 130) -> str:
    """Shards of 1 to 60 samples."""
    start, number = 0, 0
    while start < count:
        held = range(start, min(count, start + 1 + number * 23 % 60))
        write_shard(folder / f"{number:03d}.tar", (sample(i) for i in held))
        start, number = held.stop, number + 1
    return str(folder)


def data(shards_of: str, train: dict[str, Any] | None = None, /, **changed: Any) -> ShardDataModule:
    source = ShardSource(shards_of, **({"random_crop": True, "flip": True} | (train or {})))
    settings: dict[str, Any] = {"size": 16, "global_batch": 8, "total_steps": STEPS, "seed": 5}
    settings["buckets"] = AspectRatios(step=4)
    return ShardDataModule(source, None, **(settings | changed))


def ready(*arguments: Any, **changed: Any) -> ShardDataModule:
    datamodule = data(*arguments, **changed)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("threads", [0, 2])
def test_loaders_that_start_anywhere_go_on_with_the_same_batches(folder: str, threads: int) -> None:
    batches = ready(folder, window=20).train_batches()
    whole = [batches[i] for i in range(STEPS)]
    assert len({tuple(batch.images.shape) for batch in whole}) >= 3
    rng = np.random.default_rng(0)
    step = 0
    for start, workers in zip(sorted(rng.integers(0, STEPS - 2, 5)), [0, 2, 3, 0, 2], strict=True):
        again = ready(folder, window=20, threads=threads).train_batches()
        for step, batch in zip(range(start, start + 2), StepLoader(again, int(start), workers), strict=False):
            assert batch.step == step and torch.equal(batch.samples, whole[step].samples)
            assert torch.equal(batch.images, whole[step].images) and batch.fields == whole[step].fields
            assert torch.equal(batch.crop, whole[step].crop)


def test_every_sample_comes_once_an_epoch_at_the_size_of_its_bucket(folder: str) -> None:
    datamodule = ready(folder)
    sizes = datamodule.used_sizes
    visits = Counter[int]()
    batches = datamodule.train_batches()
    for step in range(int(2.3 * 130 / 8)):
        batch = batches[step]
        assert tuple(batch.images.shape[2:]) in sizes
        for index, original in zip(batch.samples.tolist(), batch.original_size.tolist(), strict=True):
            assert tuple(original[::-1]) == SIDES[index * 7 % 4]
            visits[index] += 1
    assert len(visits) == 130 and max(visits.values()) - min(visits.values()) <= 1


def test_shards_of_1_to_1000_samples_in_12_buckets_over_2_3_epochs_on_two_ranks(tmp_path: Path) -> None:
    """Visits differ by at most one, and both ranks take as many steps, each in the same bucket."""
    sizes = [(8 * (1 + i), 8 * (12 - i)) for i in range(12)]  # height, width
    pictures = [jpeg(i, width, height) for i, (height, width) in enumerate(sizes)]
    facts = [json.dumps({"width": width, "height": height}).encode() for height, width in sizes]
    rng, first = np.random.default_rng(0), 0
    for number, count in enumerate((1, 1000, 7, 350, 2, 90, 550)):
        drawn = np.minimum(rng.integers(0, 12, count), rng.integers(0, 30, count)).tolist()  # some are rare
        held = [(f"{first + i:05d}", {"jpg": pictures[b], "json": facts[b], "txt": b"x"}) for i, b in enumerate(drawn)]
        write_shard(tmp_path / f"{number}.tar", held)
        first += count
    steps = int(2.3 * first / 32)
    settings: dict[str, Any] = {"buckets": Sizes(sizes), "global_batch": 32, "total_steps": steps, "cache_gib": 1.0}
    datamodule = ready(str(tmp_path), {"random_crop": False, "flip": False}, **settings)
    visits = np.zeros(first, np.int64)
    ranks = [StepLoader(datamodule.train_batches(rank, 2)) for rank in range(2)]
    assert [len(loader) for loader in ranks] == [steps, steps]
    for one, other in zip(*ranks, strict=True):
        assert one.images.shape == other.images.shape == (16, 3, *one.original_size[0].tolist())
        assert (torch.cat([one.original_size, other.original_size]) == one.original_size[0]).all()
        np.add.at(visits, torch.cat([one.samples, other.samples]).numpy(), 1)
    assert sorted({(h, w) for h, w in sizes}) == sorted(datamodule.used_sizes)
    assert (visits.min(), visits.max()) == (2, 3) and visits.sum() == 32 * steps


LOADING = """
import json, sys
from tests.faults.test_data_order import ready
from ldm.data.loading.loader import StepLoader
folder, seen, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
try:
    start = sum(1 for line in open(seen) if line.endswith("\\n"))
except FileNotFoundError:
    start = 0
with open(seen, "a") as out:
    for batch in StepLoader(ready(folder).train_batches(), start, workers):
        out.write(json.dumps([batch.step, batch.samples.tolist()]) + "\\n")
        out.flush()
        print(batch.step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_9_at_twenty_random_steps_changes_nothing(folder: str, tmp_path: Path) -> None:
    seen = tmp_path / "seen.jsonl"
    rng = np.random.default_rng(3)
    stops = sorted(rng.choice(np.arange(1, STEPS - 1), 20, replace=False).tolist())
    for number, stop in enumerate([*stops, STEPS]):
        command = [sys.executable, "-c", LOADING, folder, str(seen), str([0, 2, 3][number % 3])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == stop:
                os.killpg(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        process.wait()
        lines = seen.read_text().splitlines(keepends=True)
        seen.write_text("".join(line for line in lines if line.endswith("\n")))
    whole = ready(folder).train_batches()
    found = [json.loads(line) for line in seen.read_text().splitlines()]
    assert found == [[step, whole[step].samples.tolist()] for step in range(STEPS)]


def _train(rank: int, world: int, folder: str, out: str, first: int, last: int) -> None:
    """Steps first to last of a linear model from its file; appends (step, loss, samples) of the global batch."""
    torch.set_num_threads(1)
    store = f"file://{out}/store_{world}_{first}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    path = Path(out, "weights.pt")
    weights = torch.load(path) if path.exists() else torch.zeros(3, dtype=torch.float64)
    batches = ready(folder).train_batches(rank, world)
    for step in range(first, last):
        batch = batches[step]
        features = batch.images.double().mean((2, 3))
        error = features @ weights - (batch.samples.double() / 130)
        summed = torch.cat([(features * error[:, None]).sum(0), error.square().sum()[None]])
        torch.distributed.all_reduce(summed)
        parts = [torch.empty_like(batch.samples) for _ in range(world)]
        torch.distributed.all_gather(parts, batch.samples)
        weights = weights - 0.5 * summed[:3] / batch.global_batch
        if rank == 0:
            with Path(out, "log.jsonl").open("a") as log:
                log.write(json.dumps([step, float(summed[3]), torch.cat(parts).tolist()]) + "\n")
    torch.distributed.barrier()
    if rank == 0:
        torch.save(weights, path)
    torch.distributed.destroy_process_group()


def _trained(folder: str, out: Path, plan: list[tuple[int, int, int]]) -> list[Any]:
    out.mkdir()
    for world, first, last in plan:
        arguments = (world, folder, str(out), first, last)
        torch.multiprocessing.start_processes(_train, arguments, nprocs=world, start_method="fork")
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "plan",
    [
        [(2, 0, 9), (1, 9, 30)],
        pytest.param([(2, 0, 30)], marks=pytest.mark.slow),
        pytest.param([(4, 0, 30)], marks=pytest.mark.slow),
        pytest.param([(4, 0, 9), (2, 9, 20), (1, 20, 30)], marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_sees_the_same_batches_and_losses(
    folder: str, tmp_path: Path, plan: list[tuple[int, int, int]]
) -> None:
    alone, shared = _trained(folder, tmp_path / "alone", [(1, 0, 30)]), _trained(folder, tmp_path / "shared", plan)
    for (step, loss, samples), (other_step, other_loss, others) in zip(alone, shared, strict=True):
        assert (step, samples) == (other_step, others)
        assert loss == pytest.approx(other_loss, rel=1e-5)


def gigapixel(data: bytes) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + (40_000).to_bytes(2, "big") * 2 + data[at + 4 :]


def test_bad_samples_have_substitutes_of_their_bucket_and_exact_counters(tmp_path: Path) -> None:
    bad = {3: "corrupt picture", 40: "empty picture", 77: "too many pixels", 90: "caption too long"}
    parts: dict[int, dict[str, bytes]] = {
        3: {"jpg": jpeg(3, *SIDES[3 * 7 % 4])[:300]},
        40: {"jpg": b""},
        77: {"jpg": gigapixel(jpeg(77, 16, 16))},
        90: {"txt": b"x" * 1_000_000},
    }
    for number in range(2):
        held = range(60 * number, 60 * number + 60)
        write_shard(tmp_path / "s" / f"{number}.tar", (sample(i, **parts.get(i, {})) for i in held))
    datamodule = ready(str(tmp_path / "s"), {"allow_damaged": True}, folder=str(tmp_path / "stage"))
    manifest = datamodule.train_fetcher.manifest
    there = {i: int(manifest.key(i)) for i in range(len(manifest))}
    batches, told = datamodule.train_batches(), Counter[tuple[int, str]]()
    plan = datamodule.plan
    for step in range(int(plan.turns.before(2).sum())):
        batch = datamodule.on_after_batch_transfer(batches[step], 0)
        assert torch.isfinite(batch.images).all()
        shapes = {SIDES[there[i] * 7 % 4] for i in batch.samples.tolist()}
        planned = {SIDES[there[datamodule.train_fetcher.selection[p]] * 7 % 4] for p in plan.step(step)[0].tolist()}
        assert shapes <= planned
        assert not {there[i] for i in batch.samples.tolist()} & bad.keys()
        told.update((there[i], reason) for i, reason in batch.bad)
    chosen = datamodule.train_fetcher.selection
    used = {there[chosen[place]] for place in range(len(chosen))}
    expected = {(i, why) for i, why in bad.items() if i in used}  # the index left out what it saw
    assert told.keys() == expected and {3, 77, 90} <= used
    by_reason = Counter(why for _, why in told.elements())
    assert Counter(why for (_, why), n in datamodule.quarantine.counts.items() for _ in range(n)) == by_reason
    listed = [json.loads(line) for line in (tmp_path / "stage" / "quarantine.jsonl").read_text().splitlines()]
    assert {(int(entry["key"]), entry["reason"]) for entry in listed} == expected
    again = [batches[i].samples.tolist() for i in range(10)]
    assert again == [ready(str(tmp_path / "s")).train_batches()[i].samples.tolist() for i in range(10)]


def test_errors_that_may_pass_are_never_substituted(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: Fetcher, index: int, offset: int, size: int) -> bytes:
        raise ConnectionError("reset")

    monkeypatch.setattr(Fetcher, "_read", unreachable)
    with pytest.raises(ConnectionError, match="reset"):
        Fetcher(load_manifest(folder), View.of(16)).fetch_or_substitute(0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_twenty_thousand_samples_grow_no_memory_and_keep_few_files_open(tmp_path: Path) -> None:
    picture = jpeg(0, 16, 16)
    for number in range(100):
        held = ((f"{i:03d}", {"jpg": picture, "txt": b"words"}) for i in range(200))
        write_shard(tmp_path / f"{number:03d}.tar", held)
    files = len(os.listdir("/proc/self/fd"))
    batches = ready(str(tmp_path), buckets=None, global_batch=100, total_steps=1000).train_batches()
    for step in range(20):
        batches[step]
    before = resident_bytes()
    for step in range(20, 200):
        batches[step]
    assert resident_bytes() - before < 50 << 20
    assert len(os.listdir("/proc/self/fd")) - files <= 64 + 20  # some shards, and the columns of the index


@pytest.mark.parametrize(
    ("train", "changed", "told"),
    [
        ({"where": "scoer > 3"}, {}, r"did you mean score"),
        ({"where": "score >> 3"}, {}, r"(?s)filter: .*\^"),
        ({"where": "score > 10000"}, {}, "train: no sample is left of 130"),
        ({}, {"buckets": Sizes([[16, 16], [200, 4]])}, "200 x 4: 0"),
        ({}, {"global_batch": 7}, "multiple of 2"),
        ({}, {"decode": "quick"}, "there is no such decoder"),
        ({"captions": {"json.atl": 1}}, {}, "did you mean alt"),
        ({"captions": {"caption": 1}}, {}, "the fields are txt"),
        ({"weight": 0.5}, {"mixed_with": "itself"}, "weights of mixed sources are .* or none"),
    ],
)
def test_bad_settings_end_before_training(
    folder: str, train: dict[str, Any], changed: dict[str, Any], told: str
) -> None:
    if "mixed_with" in changed:
        changed = {"mixed_with": {"other": ShardSource(folder)}}
    with pytest.raises(UserError, match=told):
        ready(folder, train, **changed).train_batches(world=2)


def test_a_filter_and_a_mixture_reach_the_batches_and_the_record(folder: str, tmp_path: Path) -> None:
    kept = {"where": "score >= 50", "captions": {"txt": 1, "json.alt": 1}, "weight": 3}
    other = shards(tmp_path / "other", 20)
    mixed = {"other": ShardSource(other, weight=1)}
    datamodule = ready(folder, kept, mixed_with=mixed, buckets=None, folder=str(tmp_path / "stage"), decode="fast")
    batches = datamodule.train_batches()
    captions = Counter[str]()
    for step in range(40):
        batch = batches[step]
        first = [i for i in batch.samples.tolist() if i < 130]
        assert len(first) == 6 and min(first) >= 50 and max(batch.samples.tolist()) < 150
        captions.update(text.split()[0] for text in batch.fields["caption"])
    assert captions["text"] > captions["other"] > 60
    record = json.loads((tmp_path / "stage" / "data.json").read_text())
    assert record["decode"]["name"] == "fast"
    assert record["sources"]["train"]["rules"] == [{"rule": "score >= 50", "kept": 80, "dropped": 50}]
    assert record["sources"]["other"]["used"] == 20


@pytest.mark.parametrize(
    ("train", "changed", "name"),
    [
        ({"where": "score > 3"}, {}, "where"),
        ({}, {"buckets": None}, "sizes"),
        ({}, {"window": 50}, "window"),
        ({}, {"mixed_with": "other"}, "fingerprint"),
    ],
)
def test_another_order_is_refused_at_resume(
    folder: str, tmp_path: Path, train: dict[str, Any], changed: dict[str, Any], name: str
) -> None:
    if "mixed_with" in changed:
        changed = {"mixed_with": {"other": ShardSource(shards(tmp_path, 20))}}
    state = json.loads(json.dumps(ready(folder).state_dict()))
    assert all(isinstance(value, int | str | None) for value in state.values())
    same, other = ready(folder), ready(folder, train, **changed)
    same.load_state_dict(state)
    assert len(same.train_dataloader()) == STEPS
    other.load_state_dict(state)
    with pytest.raises(UserError, match=f"another order of samples: .*{name}"):
        other.train_dataloader()


def test_the_crop_of_a_mirrored_picture_is_where_it_lies_there(tmp_path: Path) -> None:
    """Left of the crop counts from the mirrored picture's left side."""
    write_shard(tmp_path / "a.tar", [("a", {"jpg": jpeg(0, 48, 16), "txt": b"x"})])
    manifest = load_manifest(tmp_path)
    whole = Fetcher(manifest, View((16, 48)))(0).pixels
    flips = 0
    for epoch in range(12):
        found = Fetcher(manifest, View((16, 16), random_crop=True, flip=True))(0, epoch)
        plain = Fetcher(manifest, View((16, 16), random_crop=True))(0, epoch)
        left = found.crop[1]
        flipped = not np.array_equal(found.pixels, plain.pixels)
        flips += flipped
        picture = whole[:, ::-1] if flipped else whole
        assert np.array_equal(found.pixels, picture[:, left : left + 16])
    assert 2 < flips < 10
