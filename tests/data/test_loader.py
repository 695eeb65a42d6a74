import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from ldm.data.loading.batch import Batch
from ldm.data.loading.fetch import Fetcher, View
from ldm.data.loading.loader import StepLoader, TrainBatches, ValBatches
from ldm.data.order.plan import Plan
from ldm.data.shards.index import load_manifest
from ldm.randomness import key
from tests.data.make import shards


@pytest.fixture(scope="module")
def fetcher(tmp_path_factory: pytest.TempPathFactory) -> Fetcher:
    return Fetcher(load_manifest(shards(tmp_path_factory.mktemp("shards"), 50)), View.of(16))


def test_a_batch_is_what_the_plan_says(fetcher: Fetcher) -> None:
    plan = Plan(50, 12, seed=4)
    batch = TrainBatches(fetcher, plan, total_steps=9)[6]
    assert batch.samples.tolist() == plan.step(6)[0].tolist() and batch.step == 6
    assert batch.rng_keys.tolist() == [key(4, "train", 6, position) for position in range(12)]
    assert batch.images.shape == (12, 3, 16, 16) and batch.images.dtype == torch.float32
    assert batch.fields["caption"] == [f"picture {i}" for i in batch.samples.tolist()]
    assert batch.original_size.tolist() == [[16, 16]] * 12 and batch.crop.tolist() == [[0, 0]] * 12
    assert list(batch.bad) == []


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 3), (2, 2), (12, 1)])
def test_ranks_and_micro_steps_make_up_the_global_batch(fetcher: Fetcher, world: int, accumulation: int) -> None:
    plan = Plan(50, 12, seed=4)
    ranks = [TrainBatches(fetcher, plan, 5, rank, world, accumulation) for rank in range(world)]
    alone = TrainBatches(fetcher, plan, 5)
    assert len(ranks[0]) == 5 * accumulation
    for step in (0, 4):
        parts = [ranks[r][step * accumulation + a] for a in range(accumulation) for r in range(world)]
        assert {part.step for part in parts} == {step}
        for name in ("samples", "rng_keys", "images"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(alone[step], name))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_starts_anywhere_with_any_workers(fetcher: Fetcher, workers: int) -> None:
    batches = TrainBatches(fetcher, Plan(50, 4, seed=0), total_steps=7)
    loader = StepLoader(batches, start=3, workers=workers)
    assert len(loader) == 7
    for number, batch in enumerate(loader, 3):
        assert batch.step == number and torch.equal(batch.samples, batches[number].samples)
        assert torch.equal(batch.images, batches[number].images)
    assert number == 6


def test_validation_is_the_first_samples_in_order(fetcher: Fetcher) -> None:
    batches = list(StepLoader(ValBatches(fetcher, samples=10, batch=4)))
    assert [batch.samples.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[1].rng_keys.tolist() == [key("val", i) for i in (4, 5, 6, 7)]


def test_validation_is_shared_by_ranks_in_as_many_batches(fetcher: Fetcher) -> None:
    ranks = [list(StepLoader(ValBatches(fetcher, 11, 3, rank, 2))) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 2
    seen = sorted(i for rank in ranks for batch in rank for i in batch.samples.tolist())
    assert seen == list(range(10))


def test_every_tensor_of_a_batch_is_pinned_where_there_is_a_gpu(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = TrainBatches(fetcher, Plan(50, 4, seed=0), total_steps=2)
    assert not StepLoader(batches).pin_memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert StepLoader(batches).pin_memory
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor + 1)
    batch = batches[0]._replace(moments=torch.zeros(4, 2, 1, 1, 1), bad=[(1, "corrupt picture")])
    moved = pin_memory(batch)
    assert isinstance(moved, Batch) and len(pinned) == 7
    assert torch.equal(moved.images, batch.images + 1) and torch.equal(moved.crop, batch.crop + 1)
    assert moved.fields == batch.fields and moved.step == 0 and list(moved.bad) == [(1, "corrupt picture")]


def test_threads_begin_with_the_next_batches_and_forget_what_is_not_asked_for(fetcher: Fetcher) -> None:
    plan = Plan(50, 4, seed=0)
    batches, plain = TrainBatches(fetcher, plan, 9, threads=2), TrainBatches(fetcher, plan, 9)
    for step in (0, 1, 5, 6, 2, 8):
        assert torch.equal(batches[step].images, plain[step].images)
        assert sorted(batches._pending) == [later for later in (step + 1, step + 2) if later < 9]
