"""The order of a run: every sample once an epoch, from any step at once, the same for every number of processes."""

import itertools
import time
import tracemalloc
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from wantrain.data import BatchSampler, share
from wantrain.data.loading.streams import TABLE
from wantrain.data.prefetch import prefetch

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
def test_full_batches(sizes, batch_size):
    """A batch is full and of one bucket."""
    buckets = buckets_of(sizes)
    plan = BatchSampler(buckets, batch_size=batch_size, seed=0)
    for step in range(60):
        batch = plan.batch(step)
        assert batch.shape == (batch_size,)
        assert len(set(buckets[batch])) == 1


@pytest.mark.parametrize(("sizes", "batch_size"), CASES)
def test_bucket_permutations(sizes, batch_size):
    """For each bucket, the n-th pass over its samples is a permutation of them, whatever the batch size."""
    buckets = buckets_of(sizes)
    plan = BatchSampler(buckets, batch_size=batch_size, seed=0)
    used = np.concatenate([plan.batch(step) for step in first_steps(plan, 9)])
    for bucket, size in zip(sorted(set(buckets)), sizes, strict=True):
        stream = used[buckets[used] == bucket]
        assert len(stream) == 9 * size // batch_size * batch_size
        for cycle in range(len(stream) // size):
            assert sorted(stream[cycle * size : (cycle + 1) * size]) == np.flatnonzero(buckets == bucket).tolist()


@pytest.mark.parametrize(("sizes", "batch_size"), CASES)
def test_epoch_counts(sizes, batch_size):
    """After e epochs every sample was used e times, but for fewer than a batch per bucket that is carried over."""
    buckets = buckets_of(sizes)
    plan = BatchSampler(buckets, batch_size=batch_size, seed=1)
    for epochs in (1, 2, 5, 8):
        used = Counter(int(sample) for step in first_steps(plan, epochs) for sample in plan.batch(step))
        for bucket in set(buckets):
            members = np.flatnonzero(buckets == bucket)
            missing = [epochs - used[int(sample)] for sample in members]
            assert sum(missing) == epochs * len(members) % batch_size
            assert all(count >= 0 for count in missing)


def test_even_epochs():
    """An epoch uses every sample exactly once where the batch size divides every bucket."""
    plan = BatchSampler(buckets_of([40, 24]), batch_size=8, seed=0)
    for epoch in range(4):
        samples = np.concatenate([plan.batch(step) for step in range(epoch * 8, epoch * 8 + 8)])
        assert sorted(samples.tolist()) == list(range(64))
        assert {plan.epoch(step) for step in range(epoch * 8, epoch * 8 + 8)} == {epoch}


def test_order_by_seed_and_epoch():
    """The order depends on the seed and the epoch."""

    def order(seed, epoch):
        plan = BatchSampler(buckets_of([64]), batch_size=8, seed=seed)
        return [plan.batch(step).tolist() for step in range(epoch * 8, epoch * 8 + 8)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert order(-1, 0) != order(1, 0)


def test_bucket_mix():
    """Batches of different buckets are mixed within an epoch."""
    buckets = buckets_of([80, 80])
    plan = BatchSampler(buckets, batch_size=4, seed=0)
    order = [int(buckets[plan.batch(step)[0]]) for step in range(40)]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert 10 <= changes <= 30


@pytest.mark.parametrize(("sizes", "batch_size"), CASES)
def test_random_access(sizes, batch_size):
    """Random access to a step gives the batch of the sequence."""
    buckets = buckets_of(sizes)
    plan = BatchSampler(buckets, batch_size=batch_size, seed=5)
    sequence = [plan.batch(step).tolist() for step in range(50)]
    for step in np.random.default_rng(0).permutation(50):
        assert plan.batch(int(step)).tolist() == sequence[step]
        assert BatchSampler(buckets, batch_size=batch_size, seed=5).batch(int(step)).tolist() == sequence[step]


def test_far_step_time():
    """The batch of a far step is computed quickly."""
    plan = BatchSampler(buckets_of([600_000, 300_000, 100_000]), batch_size=16, seed=0)
    start = time.perf_counter()
    batches = [plan.batch(step) for step in (10**6, 10**9, 10**12 + 7)]
    assert time.perf_counter() - start < 3  # 0.2 s where nothing else runs
    assert all(len(set(batch.tolist())) == 16 for batch in batches)
    start = time.perf_counter()
    for step in range(10**6, 10**6 + 200):
        plan.batch(step)
    assert time.perf_counter() - start < 1


def test_golden_order():
    """The order never changes: a run resumed with another version of NumPy or on another machine keeps it."""
    plan = BatchSampler(np.array([0, 1, 0, 1, 0, 0, 0, 1, 0, 0]), batch_size=2, seed=7)
    assert [plan.batch(step).tolist() for step in range(6)] == GOLDEN


def order_of(plan, steps):
    return np.concatenate([plan.batch(step) for step in steps])


# ------------------------------------------------------------------------------------------------- many samples


@pytest.mark.parametrize("size", [TABLE + 1, 2**13, 3 * TABLE + 7])
def test_large_bucket_shuffle(size):
    """The arithmetic shuffle of large buckets is as random as a table."""

    def stream(seed):
        return order_of(
            BatchSampler(np.zeros(size, dtype=np.int32), batch_size=50, seed=seed), range(2 * size // 50 + 1)
        )

    cycles = stream(4)[: 2 * size].reshape(2, size)
    for cycle in cycles:
        assert sorted(cycle.tolist()) == list(range(size))
        assert abs(np.corrcoef(cycle, np.arange(size))[0, 1]) < 4 / size**0.5
        assert abs(np.corrcoef(cycle[1:], cycle[:-1])[0, 1]) < 4 / size**0.5
        # Of a random permutation's points, one stays in its place on average.
        assert (cycle == np.arange(size)).sum() < 8
        # Places of 16 equal pieces of the range in 16 equal pieces of the order: chi-squared, 225 degrees of freedom.
        table = np.histogram2d(cycle, np.arange(size), bins=16)[0]
        assert ((table - size / 256) ** 2 / (size / 256)).sum() < 225 + 4 * (2 * 225) ** 0.5
    assert (cycles[0] == cycles[1]).sum() < 8
    assert (cycles[0] == stream(5)[:size]).sum() < 8


def test_epochs_in_parts():
    """An epoch of many batches, planned in several parts, uses every sample once."""
    sizes = [2 * TABLE + 5, 700, 11]
    buckets = buckets_of(sizes)
    plan = BatchSampler(buckets, batch_size=1, seed=0)
    assert plan._parts > 2
    for epoch in range(2):
        steps = range(epoch * sum(sizes), (epoch + 1) * sum(sizes))
        assert sorted(order_of(plan, steps).tolist()) == list(range(sum(sizes)))
        assert plan.epoch(steps[0]) == plan.epoch(steps[-1]) == epoch
        # Every bucket comes all along the epoch: no half of it has more than its share, but for one per part.
        first = np.bincount(buckets[order_of(plan, steps[: sum(sizes) // 2])])[1::2]
        assert (abs(first - np.array(sizes) / 2) < 60).all()


def test_sampler_memory():
    """A sampler of a million samples takes less than 13 bytes per sample."""
    rng = np.random.default_rng(0)
    buckets, sets = rng.integers(0, 5, 10**6).astype(np.int32), rng.integers(0, 2, 10**6).astype(np.int8)
    weights = rng.random(10**6).astype(np.float32)
    for more in ({}, {"weights": weights, "sets": sets, "shares": (0.7, 0.3)}):
        tracemalloc.start()
        plan = BatchSampler(buckets, batch_size=16, seed=0, **more)
        plan.batch(0)
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert kept / 10**6 < 13  # bytes; the goal is 64


# ------------------------------------------------------------------------------------------------- weights


def test_whole_weights():
    """Weights of one change nothing, and whole weights are repeats per epoch."""
    buckets = buckets_of([33, 5, 2])
    plain = BatchSampler(buckets, batch_size=4, seed=0)
    ones = BatchSampler(buckets, batch_size=4, seed=0, weights=np.ones(40))
    assert [plain.batch(step).tolist() for step in range(50)] == [ones.batch(step).tolist() for step in range(50)]
    weights = np.arange(40) % 4
    plan = BatchSampler(buckets, batch_size=1, seed=0, weights=weights)
    assert plan.samples_per_epoch == weights.sum()
    for epoch in range(3):
        used = order_of(plan, range(epoch * weights.sum(), (epoch + 1) * weights.sum()))
        assert np.bincount(used, minlength=40).tolist() == weights.tolist()


def test_weighted_counts():
    """Samples come as often as they weigh: over many epochs within 1 %, and never far from it before."""
    weights = np.array([0.1, 0.25, 0.5, 1, 1, 2.5, 3.141, 0.333, 7, 0.007] * 6)
    buckets = np.repeat([0, 1, 2], 20)
    plan = BatchSampler(buckets, batch_size=5, seed=1, weights=weights)
    epochs, steps = 1000, 1000 * plan.samples_per_epoch // 5
    used = np.bincount(order_of(plan, range(steps)), minlength=60)
    wanted = weights * steps * 5 / weights.sum()
    assert (abs(used - wanted) < np.maximum(0.01 * wanted, 3)).all()
    assert plan.epoch(steps) == pytest.approx(epochs, rel=0.01)
    soon = np.bincount(order_of(plan, range(steps // 100)), minlength=60)
    assert (abs(soon - wanted / 100) < 5).all()


def test_bad_weights_are_refused():
    for weights, said in (
        (np.zeros(4), "every sample has weight 0"),
        (np.array([1, 1, -1, 1]), "between 0 and 1000"),
        (np.array([1, np.nan, 1, 1]), "between 0 and 1000"),
        (np.ones(3), "3 weights were given for 4 samples"),
    ):
        with pytest.raises(ValueError, match=said):
            BatchSampler(np.zeros(4, dtype=np.int64), batch_size=1, seed=0, weights=weights)


# ------------------------------------------------------------------------------------------------- several sets


def mix(batch_size, *, seed=0, shares=(0.7, 0.2, 0.1)):
    """Three sets over three buckets; a large set with a small share, and a bucket that only one of them has."""
    sizes = {(0, 0): 40, (0, 1): 13, (1, 0): 7, (1, 1): 300, (1, 2): 60, (2, 1): 19}  # (set, bucket)
    sets, buckets = np.repeat(np.array(list(sizes)), list(sizes.values()), axis=0).T
    mixed = np.random.default_rng(0).permutation(len(sets))
    sets, buckets = sets[mixed], buckets[mixed]
    return BatchSampler(buckets, batch_size=batch_size, seed=seed, sets=sets, shares=shares), sets, buckets


@pytest.mark.parametrize("batch_size", [1, 4, 48])
def test_set_shares(batch_size):
    """Sets have their shares, and every pass over a bucket of a set is a permutation of its samples."""
    plan, sets, buckets = mix(batch_size)
    used = order_of(plan, range(20_000 // batch_size))
    shares = np.bincount(sets[used]) / len(used)
    assert shares == pytest.approx([0.7, 0.2, 0.1], rel=0.01)
    for own in range(3):
        # Inside a set buckets come by their sizes, and of each bucket every pass is a permutation.
        for bucket in set(buckets[sets == own]):
            members = np.flatnonzero((sets == own) & (buckets == bucket))
            stream = used[(sets[used] == own) & (buckets[used] == bucket)]
            part = len(stream) / (sets[used] == own).sum()
            assert part == pytest.approx(len(members) / (sets == own).sum(), rel=0.05)
            for cycle in range(len(stream) // len(members)):
                assert sorted(stream[cycle * len(members) : (cycle + 1) * len(members)]) == members.tolist()
    if batch_size > 1:
        # Sets are mixed within batches where they share a bucket.
        both = [len(set(sets[plan.batch(step)])) > 1 for step in range(50)]
        assert sum(both) > 15


def test_shares_over_a_run():
    """The shares hold in every part of a run."""
    plan, sets, _ = mix(4)
    used = order_of(plan, range(5000))
    for start in range(0, 18_000, 2000):
        assert np.bincount(sets[used[start : start + 2000]]) / 2000 == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
    assert [plan.batch(step).tolist() for step in range(9)] == [
        mix(4, shares=(7, 2, 1))[0].batch(step).tolist() for step in range(9)
    ]


def test_mixture_access_and_weights():
    """A mixture is resumed at any step, and sample weights hold within its sets."""
    plan, sets, buckets = mix(4)
    sequence = [plan.batch(step).tolist() for step in range(300)]
    for step in np.random.default_rng(0).permutation(300)[:60]:
        assert mix(4)[0].batch(int(step)).tolist() == sequence[step]
    weights = np.where(np.arange(len(sets)) % 2, 1.5, 0.5)
    weighted = BatchSampler.of(
        SimpleNamespace(buckets=buckets, weights=weights, sets=sets, shares=(1, 1, 2)), batch_size=8, seed=0
    )
    used = order_of(weighted, range(8000))
    assert np.bincount(sets[used]) / len(used) == pytest.approx([0.25, 0.25, 0.5], rel=0.01)
    for own in range(3):
        odd = (weights[used][sets[used] == own] == 1.5).mean()
        assert odd == pytest.approx(
            weights[(sets == own) & (weights == 1.5)].sum() / weights[sets == own].sum(), rel=0.02
        )


def test_bad_shares_are_refused():
    sets = np.array([0, 0, 1, 1])
    for shares, said in (((1, 0), "above 0"), ((1, float("nan")), "above 0"), ((1, 1, 1), "set 2 has nothing")):
        with pytest.raises(ValueError, match=said):
            BatchSampler(np.zeros(4, dtype=np.int64), batch_size=1, seed=0, sets=sets, shares=shares)


# ------------------------------------------------------------------------------------------------- workers, processes


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_worker_independence(workers):
    """The order is the same for any number of workers.

    A worker needs only the step's number: each has its own sampler, for its own steps.
    """
    steps = 80
    if workers == 0:
        found = [mix(8)[0].batch(step).tolist() for step in range(steps)]
    else:
        threads = [
            prefetch(partial(mix(8)[0].batch, step) for step in range(w, steps, workers)) for w in range(workers)
        ]
        found = [next(threads[step % workers]).tolist() for step in range(steps)]
        for thread in threads:
            thread.close()
    plan = mix(8)[0]
    assert found == [plan.batch(step).tolist() for step in range(steps)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_process_shares(world):
    """Processes share every step and have equal work."""
    plan, _, buckets = mix(8)
    for step in range(100):
        parts = [
            share(mix_batch, micro, 2, rank, world)
            for mix_batch in [plan.batch(step)]
            for micro in range(2)
            for rank in range(world)
        ]
        assert np.concatenate(parts).tolist() == plan.batch(step).tolist()
        assert len({(len(part), *set(buckets[part])) for part in parts}) == 1


@pytest.mark.parametrize("epochs", [1, 3, 0.5, 2.25, 1e-9])
def test_steps_for_epochs(epochs):
    plan = BatchSampler(buckets_of([41]), batch_size=8, seed=0)
    steps = plan.steps_for_epochs(epochs)
    assert steps * 8 >= epochs * 41
    assert (steps - 1) * 8 < epochs * 41
    if epochs >= 1:
        seen = Counter(int(sample) for step in range(steps) for sample in plan.batch(step))
        assert min(seen[sample] for sample in range(41)) >= int(epochs)


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 3)])
def test_shares_of_batch(accumulate, world):
    """The shares of all processes, joined in order, are the batch."""
    batch, places = np.arange(100, 124), range(24)
    shares = [share(batch, micro, accumulate, rank, world) for micro in range(accumulate) for rank in range(world)]
    assert np.concatenate(shares).tolist() == batch.tolist()
    assert {len(part) for part in shares} == {24 // accumulate // world}
    again = [share(places, micro, accumulate, rank, world) for micro in range(accumulate) for rank in range(world)]
    assert np.concatenate(again).tolist() == list(places)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        BatchSampler(np.array([], dtype=np.int64), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        BatchSampler(np.zeros(4, dtype=np.int64), batch_size=0, seed=0)
    with pytest.raises(ValueError, match=r"batch_size=10 must be a multiple of accumulate x processes = 2 x 2"):
        share(np.arange(10), 0, 2, 0, 2)
