"""The order of a run: every sample once an epoch, from any step at once, the same for every number of processes."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from wantrain.data import Plan, share

GOLDEN = [[9, 5], [3, 7], [6, 0], [4, 8], [2, 5], [1, 1]]

CASES = [
    # bucket sizes, batch size
    ([40], 8),
    ([41], 8),
    ([7], 3),
    ([3], 8),
    ([1], 5),
    ([50, 30, 20], 8),
    ([33, 5, 2, 1], 7),
    ([2, 3, 4], 16),
]


def buckets_of(sizes, seed=3):
    """Bucket numbers of samples in mixed order; the numbers have gaps, as after a hold-out."""
    numbers = np.repeat(np.arange(len(sizes)) * 2 + 1, sizes)
    return np.random.default_rng(seed).permutation(numbers)


def first_steps(plan, epochs):
    return list(itertools.takewhile(lambda step: plan.epoch(step) < epochs, itertools.count()))


@pytest.mark.parametrize(("sizes", "batch_size"), CASES)
def test_a_batch_is_of_one_bucket_and_full(sizes, batch_size):
    buckets = buckets_of(sizes)
    plan = Plan(buckets, batch_size=batch_size, seed=0)
    for step in range(60):
        batch = plan.batch(step)
        assert batch.shape == (batch_size,)
        assert len(set(buckets[batch])) == 1


@pytest.mark.parametrize(("sizes", "batch_size"), CASES)
def test_every_sample_of_a_bucket_comes_once_before_any_comes_again(sizes, batch_size):
    """For each bucket, the n-th pass over its samples is a permutation of them, whatever the batch size."""
    buckets = buckets_of(sizes)
    plan = Plan(buckets, batch_size=batch_size, seed=0)
    used = np.concatenate([plan.batch(step) for step in first_steps(plan, 9)])
    for bucket, size in zip(sorted(set(buckets)), sizes, strict=True):
        stream = used[buckets[used] == bucket]
        assert len(stream) == 9 * size // batch_size * batch_size
        for lap in range(len(stream) // size):
            assert sorted(stream[lap * size : (lap + 1) * size]) == np.flatnonzero(buckets == bucket).tolist()


@pytest.mark.parametrize(("sizes", "batch_size"), CASES)
def test_counts_stay_within_the_leftover_at_every_end_of_an_epoch(sizes, batch_size):
    """After e epochs every sample was used e times, but for fewer than a batch per bucket that is carried over."""
    buckets = buckets_of(sizes)
    plan = Plan(buckets, batch_size=batch_size, seed=1)
    for epochs in (1, 2, 5, 8):
        used = Counter(int(sample) for step in first_steps(plan, epochs) for sample in plan.batch(step))
        for bucket in set(buckets):
            members = np.flatnonzero(buckets == bucket)
            missing = [epochs - used[int(sample)] for sample in members]
            assert sum(missing) == epochs * len(members) % batch_size
            assert all(count >= 0 for count in missing)


def test_epochs_divide_evenly_where_batches_do():
    plan = Plan(buckets_of([40, 24]), batch_size=8, seed=0)
    for epoch in range(4):
        samples = np.concatenate([plan.batch(step) for step in range(epoch * 8, epoch * 8 + 8)])
        assert sorted(samples.tolist()) == list(range(64))
        assert {plan.epoch(step) for step in range(epoch * 8, epoch * 8 + 8)} == {epoch}


def test_the_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        plan = Plan(buckets_of([64]), batch_size=8, seed=seed)
        return [plan.batch(step).tolist() for step in range(epoch * 8, epoch * 8 + 8)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert order(-1, 0) != order(1, 0)


def test_buckets_are_mixed_within_an_epoch():
    buckets = buckets_of([80, 80])
    plan = Plan(buckets, batch_size=4, seed=0)
    order = [int(buckets[plan.batch(step)[0]]) for step in range(40)]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert 10 <= changes <= 30


@pytest.mark.parametrize(("sizes", "batch_size"), CASES)
def test_random_access_equals_the_sequence(sizes, batch_size):
    buckets = buckets_of(sizes)
    plan = Plan(buckets, batch_size=batch_size, seed=5)
    sequence = [plan.batch(step).tolist() for step in range(50)]
    for step in np.random.default_rng(0).permutation(50):
        assert plan.batch(int(step)).tolist() == sequence[step]
        assert Plan(buckets, batch_size=batch_size, seed=5).batch(int(step)).tolist() == sequence[step]


def test_a_far_step_is_quick():
    plan = Plan(buckets_of([600_000, 300_000, 100_000]), batch_size=16, seed=0)
    start = time.perf_counter()
    batches = [plan.batch(step) for step in (10**6, 10**9, 10**12 + 7)]
    assert time.perf_counter() - start < 3  # 0.2 s where nothing else runs
    assert all(len(set(batch.tolist())) == 16 for batch in batches)
    start = time.perf_counter()
    for step in range(10**6, 10**6 + 200):
        plan.batch(step)
    assert time.perf_counter() - start < 1


def test_the_order_is_fixed_for_good():
    """A run resumed under another version of NumPy, or on another machine, goes on in this same order."""
    plan = Plan(np.array([0, 1, 0, 1, 0, 0, 0, 1, 0, 0]), batch_size=2, seed=7)
    assert [plan.batch(step).tolist() for step in range(6)] == GOLDEN


@pytest.mark.parametrize("epochs", [1, 3, 0.5, 2.25, 1e-9])
def test_steps_for_epochs(epochs):
    plan = Plan(buckets_of([41]), batch_size=8, seed=0)
    steps = plan.steps_for_epochs(epochs)
    assert steps * 8 >= epochs * 41
    assert (steps - 1) * 8 < epochs * 41
    if epochs >= 1:
        seen = Counter(int(sample) for step in range(steps) for sample in plan.batch(step))
        assert min(seen[sample] for sample in range(41)) >= int(epochs)


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 3)])
def test_shares_of_all_processes_are_the_batch(accumulate, world):
    batch, places = np.arange(100, 124), range(24)
    shares = [share(batch, micro, accumulate, rank, world) for micro in range(accumulate) for rank in range(world)]
    assert np.concatenate(shares).tolist() == batch.tolist()
    assert {len(part) for part in shares} == {24 // accumulate // world}
    again = [share(places, micro, accumulate, rank, world) for micro in range(accumulate) for rank in range(world)]
    assert np.concatenate(again).tolist() == list(places)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        Plan(np.array([], dtype=np.int64), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        Plan(np.zeros(4, dtype=np.int64), batch_size=0, seed=0)
    with pytest.raises(ValueError, match=r"batch_size=10 must divide by accumulate x processes = 2 x 2"):
        share(np.arange(10), 0, 2, 0, 2)
