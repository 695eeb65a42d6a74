import numpy as np
import pytest

from ldm.data.order.plan import Plan, micro_batch, permute
from ldm.errors import UserError

SIZES = [
    (1, None),
    (2, None),
    (7, None),
    (100, None),
    (1000, 64),
    (1001, 100),
    (1000, 1),
    (1300, 640),
    (50, 500),
]


def stream(plan: Plan, samples: int) -> np.ndarray:
    """The first `samples` indices."""
    steps = -(-samples // plan.global_batch)
    return np.concatenate([plan.step(step)[0] for step in range(steps)])[:samples]


@pytest.mark.parametrize(("samples", "window"), SIZES)
@pytest.mark.parametrize("global_batch", [7, 33])
def test_each_epoch_holds_every_sample_once(samples: int, window: int | None, global_batch: int) -> None:
    plan = Plan(samples, global_batch, seed=3, window=window)
    for epoch in stream(plan, 3 * samples).reshape(3, samples):
        assert sorted(epoch) == list(range(samples))


def test_batches_run_across_epochs() -> None:
    epochs = np.concatenate([Plan(10, 4, 0).step(step)[1] for step in range(5)])
    assert epochs.tolist() == [0] * 10 + [1] * 10


@pytest.mark.parametrize("window", [None, 130])
def test_the_global_batch_does_not_change_the_order(window: int | None) -> None:
    orders = [stream(Plan(500, batch, 5, window), 1000) for batch in (250, 48, 1)]
    assert all((order == orders[0]).all() for order in orders)


def test_seeds_and_epochs_differ() -> None:
    first = stream(Plan(1000, 100, 0), 2000)
    assert (stream(Plan(1000, 100, 0), 2000) == first).all()
    assert (stream(Plan(1000, 100, 1), 1000) == first[:1000]).sum() < 10
    assert (first[1000:] == first[:1000]).sum() < 10


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (4, 3), (1, 24), (24, 1)])
def test_ranks_share_the_same_global_batch(world: int, accumulation: int) -> None:
    plan = Plan(100, 24, 1)
    micro = micro_batch(24, world, accumulation)
    shares = [plan.rank_slice(rank, world, micro, accumulation) for rank in range(world)]
    assert sorted(np.concatenate([share.ravel() for share in shares])) == list(range(24))
    for share in shares:
        assert share.shape == (accumulation, micro)
        assert (plan.at(9, share[-1])[0] == plan.step(9)[0][share[-1]]).all()


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 6, such as 24"):
        micro_batch(25, 3, 2)
    with pytest.raises(UserError, match="25 is not 3 ranks x 4 samples x 2"):
        Plan(10, 25, 0).rank_slice(0, 3, 4, 2)
    with pytest.raises(UserError, match="rank 3"):
        Plan(10, 24, 0).rank_slice(3, 3, 4, 2)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"global_batch": 0}, {"window": 0}])
def test_numbers_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least 1, got 0"):
        Plan(**({"samples": 10, "global_batch": 2, "seed": 0, "window": 4} | wrong))


@pytest.mark.parametrize("n", [2, 3, 10, 25, 60])
def test_every_place_gives_every_sample_as_often(n: int) -> None:
    """Chi-square of place x sample counts over keys: mean (n - 1)^2, deviation sqrt(2) (n - 1)."""
    draws = 4000
    keys = np.random.default_rng(0).integers(0, 1 << 64, draws, dtype=np.uint64)
    out = permute(np.tile(np.arange(n), draws), np.full(n * draws, n), np.repeat(keys, n)).reshape(draws, n)
    counts = np.stack([np.bincount(out[:, place], minlength=n) for place in range(n)])
    chi2 = ((counts - draws / n) ** 2 / (draws / n)).sum()
    assert abs(chi2 - (n - 1) ** 2) < 5 * np.sqrt(2) * (n - 1) + 1


@pytest.mark.parametrize("n", [10, 64])
def test_neighbours_part_at_random(n: int) -> None:
    """The difference of two places that follow one another takes each value but 0 as often."""
    draws = 3000
    keys = np.random.default_rng(1).integers(0, 1 << 64, draws, dtype=np.uint64)
    out = permute(np.tile(np.arange(n), draws), np.full(n * draws, n), np.repeat(keys, n)).reshape(draws, n)
    steps = (np.diff(out, axis=1) % n).ravel()
    counts = np.bincount(steps, minlength=n)
    expected = steps.size / (n - 1)
    assert counts[0] == 0
    chi2 = ((counts[1:] - expected) ** 2 / expected).sum()
    assert chi2 < (n - 2) + 6 * np.sqrt(2 * (n - 2))


def test_a_window_reads_few_stretches_and_mixes_them() -> None:
    samples = 64_000
    order = stream(Plan(samples, 1000, 0, window=6490), samples)  # ten windows of 64 stretches of 100
    for read in order.reshape(-1, 6400):
        runs = np.count_nonzero(np.diff(np.sort(read)) > 1) + 1
        assert runs <= 65  # 64 stretches; the one at the seam may be in two parts
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


def test_a_far_step_of_a_large_set_costs_the_same() -> None:
    indices, epochs = Plan(10**10, 2048, 0, 1 << 20).step(10**9)
    assert epochs[0] == 2048 * 10**9 // 10**10
    assert len(set(indices.tolist())) == 2048 and indices.min() >= 0 and indices.max() < 10**10
