"""Buckets and several sources in the order: visits, one bucket a batch, proportions, no state."""

import numpy as np
import pytest

from ldm.data.order.bucket_schedule import BucketSchedule
from ldm.data.order.mixing import PERIOD, MixtureSchedule
from ldm.data.order.plan import Plan, bucket_masses, source_shares
from ldm.errors import UserError

TWELVE = [997, 64, 65, 130, 700, 333, 128, 91, 404, 250, 77, 512]
G = 64


def visits_after(plan: Plan, steps: int) -> np.ndarray:
    indices, _ = plan.at_many(np.arange(steps), np.arange(plan.global_batch))
    return np.bincount(indices.ravel(), minlength=int(plan.samples.sum()))


def bucket_of(plan: Plan) -> np.ndarray:
    return np.repeat(np.arange(plan.samples.shape[1]), plan.samples[0])


@pytest.mark.parametrize("epochs", [1, 2, 2.3, 3, 5.5])
def test_visits_differ_by_at_most_one_over_twelve_buckets(epochs: float) -> None:
    plan = Plan([TWELVE], G, seed=3)
    steps = plan.turns.before(epochs).sum() if isinstance(epochs, int) else int(epochs * sum(TWELVE) / G)
    visits = visits_after(plan, int(steps))
    assert visits.max() - visits.min() <= 1 and visits.max() > 0


def test_only_an_epochs_first_batches_let_visits_differ_by_two() -> None:
    plan = Plan([TWELVE], G, seed=0)
    visits = np.zeros(sum(TWELVE), np.int64)
    late = []
    for step in range(200):
        np.add.at(visits, plan.step(step)[0], 1)
        epoch = plan.turns.epoch(step)
        if visits.max() - visits.min() > 1:
            assert epoch > 0 and visits.max() - visits.min() == 2
            late.append(step - plan.turns.before(epoch).sum())
    assert max(late) < len(TWELVE)


def test_every_global_batch_is_of_one_bucket_and_epochs_are_whole() -> None:
    plan = Plan([TWELVE], G, seed=1, window=100)
    owner = bucket_of(plan)
    by_bucket: dict[int, list[np.ndarray]] = {}
    for step in range(180):
        indices, epochs = plan.step(step)
        assert set(owner[indices]) == {plan.bucket(step)}
        assert len(set(zip(indices.tolist(), epochs.tolist(), strict=True))) == G
        by_bucket.setdefault(plan.bucket(step), []).append(indices)
    for bucket, batches in by_bucket.items():
        stream = np.concatenate(batches)
        n = TWELVE[bucket]
        for epoch in stream[: len(stream) // n * n].reshape(-1, n):
            assert len(set(epoch.tolist())) == n


def test_steps_asked_in_any_order_are_the_same() -> None:
    plan = Plan([TWELVE], G, seed=1)
    whole, epochs = plan.at_many(np.arange(150), np.arange(G))
    for step in np.random.default_rng(0).permutation(150):
        assert (Plan([TWELVE], G, seed=1).step(int(step))[0] == whole[step]).all()
        assert (plan.at(int(step), np.array([5, 3]))[1] == epochs[step, [5, 3]]).all()


def test_a_bucket_is_served_evenly_over_an_epoch() -> None:
    samples = np.array([5000, 3000, 2000])
    order = BucketSchedule(samples, 10, seed=0).at(np.arange(1000))[0]
    assert np.bincount(order).tolist() == [500, 300, 200]
    served = np.cumsum(order[:, None] == np.arange(3), axis=0)
    ideal = (np.arange(1000)[:, None] + 1) * samples / 10000
    assert np.abs(served - ideal).max() < 4
    assert (order != BucketSchedule(samples, 10, seed=1).at(np.arange(1000))[0]).mean() > 0.3
    second = BucketSchedule(samples, 10, seed=0).at(np.arange(1000, 2000))[0]
    assert (order != second).mean() > 0.3


def test_a_bucket_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="has 63 samples, fewer than the 64"):
        Plan([[100, 63]], 64, 0)
    assert len(Plan(63, 64, 0).step(0)[0]) == 64  # without buckets a batch may hold a sample twice


WEIGHTS = [0.7, 0.2, 0.1]
SAMPLES = [[1000, 400], [50, 30], [77, 3000]]


def test_shares_hold_within_each_batch_to_one_sample() -> None:
    plan = Plan(SAMPLES, 48, seed=2, weights=WEIGHTS)
    shares = source_shares(plan.samples, WEIGHTS)
    owner = np.repeat(np.arange(3), plan.samples.sum(1))
    counts = np.zeros(3)
    for step in range(600):
        found = np.bincount(owner[plan.step(step)[0]], minlength=3)
        assert (np.abs(found - 48 * shares[:, plan.bucket(step)]) < 1).all()
        counts += found
    assert counts / counts.sum() == pytest.approx(WEIGHTS, abs=0.01)


def test_without_buckets_the_shares_are_the_weights() -> None:
    assert source_shares(np.array([[10], [1000]]), [3, 1])[:, 0] == pytest.approx([0.75, 0.25])
    assert source_shares(np.array([[10], [30]]), None)[:, 0] == pytest.approx([0.25, 0.75])
    assert bucket_masses(np.array([[10, 5], [30, 15]]), [1, 1]).tolist() == [40, 20]


def test_all_samples_of_a_source_are_visited_as_often_whatever_their_bucket() -> None:
    plan = Plan(SAMPLES, 48, seed=2, weights=WEIGHTS)
    visits = visits_after(plan, 2000)
    for start, samples, weight in zip([0, 1400, 1480], plan.samples.sum(1), WEIGHTS, strict=True):
        expected = 2000 * 48 * weight / samples
        assert np.abs(visits[start : start + samples] - expected).max() < 0.03 * expected + 2


def test_each_source_goes_through_its_own_epochs() -> None:
    plan = Plan([[40], [1000]], 16, seed=0, weights=[1, 1])
    indices, epochs = plan.at_many(np.arange(100), np.arange(16))
    first = indices[indices < 40]
    assert len(first) == 800 and (np.bincount(first) == 20).all()
    assert sorted(set(epochs[indices < 40].tolist())) == list(range(20))


def test_shares_sum_up_in_closed_form_and_spread_over_positions() -> None:
    shares = MixtureSchedule(np.array([0.3, 0.6, 0.1]), 10, seed=0, bucket=0)
    assert (shares.numbers.sum(1) == 10).all()
    sources, places = zip(*(shares.at(c, np.arange(10)) for c in range(2 * PERIOD + 3)), strict=True)
    source, place = np.concatenate(sources), np.concatenate(places)
    for d in range(3):
        assert sorted(place[source == d]) == list(range((source == d).sum()))
    by_position = np.stack(sources)
    assert np.abs((by_position == 1).mean(0) - 0.6).max() < 0.05


def test_lanes_are_a_sources_samples_of_a_bucket() -> None:
    plan = Plan([[3, 4], [5, 6]], 1, 0)
    lanes = [plan.lane(source, bucket) for source in range(2) for bucket in range(2)]
    assert lanes == [range(0, 3), range(3, 7), range(7, 12), range(12, 18)]


@pytest.mark.parametrize(("window", "classes"), [(6400, 10), (None, 30), (3333, 8)])
def test_class_sorted_shards_are_mixed_within_three_sigma(window: int | None, classes: int) -> None:
    """At a window of 64 stretches, as docs/data.md has it; 0.27 % of normal numbers are beyond three."""
    samples, batch = 64_000, 200
    label = np.arange(samples) * classes // samples
    indices, _ = Plan(samples, batch, seed=5, window=window).at_many(np.arange(samples // batch), np.arange(batch))
    counts = np.stack([np.bincount(row, minlength=classes) for row in label[indices]])
    deviation = (counts - batch / classes) / np.sqrt(batch / classes * (1 - 1 / classes))
    assert (np.abs(deviation) <= 3).mean() > 0.992
    assert np.square(deviation).mean() == pytest.approx(1, abs=0.25)
