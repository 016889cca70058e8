"""Sets' weights by step: each phase draws its sets only, streams go on from phase to phase, and resume is a seek."""

from collections import Counter

import numpy as np
import pytest

from wantrain.data import BatchSampler, BucketStreams, PackSampler, PhasedSampler, phase_at, read_schedule
from wantrain.data.loading.schedule import Entry, check_past, entries_of
from wantrain.data.loading.streams import Interleave

#: Set 0: 40 images of bucket 0. Set 1: 30 clips of bucket 1 and 20 of bucket 2. Set 2: 25 clips of bucket 2.
BUCKETS = np.repeat([0, 1, 2, 2], [40, 30, 20, 25])
SETS = np.repeat([0, 1, 1, 2], [40, 30, 20, 25])
NAMES = ("images", "small", "large")
SCHEDULE = [
    {"from": 0, "sets": {"images": 1}, "batch_size": 8},
    {"from": 7, "sets": {"images": 1, "small": 3}},
    {"from": 30, "sets": {"small": 1, "large": 1}, "batch_size": 2},
]


def streams(seed=0):
    return BucketStreams(BUCKETS, seed=seed, sets=SETS, shares=[1.0] * 3)


def batches(schedule=SCHEDULE):
    def make(own, entry):
        return BatchSampler(own, batch_size=entry.batch_size or 4, seed=0)

    return PhasedSampler.of(read_schedule(schedule, NAMES), streams(), make)


def packs(schedule):
    return PhasedSampler.of(
        read_schedule(schedule, NAMES),
        streams(),
        lambda own, _: PackSampler(own, {0: 1, 1: 4, 2: 6}, budget=12, passes=2, seed=0),
    )


def step_of(order, step):
    """(samples, positions) of a step."""
    phase = phase_at(order, step)
    own = step - phase.start
    if isinstance(phase.sampler, PackSampler):
        both = [phase.sampler.pack(own, 0, rank, 2).later(phase.before) for rank in range(2)]
        groups = [group for pack in both for group in pack.groups]
        return [np.concatenate(each) for each in zip(*groups, strict=True)]
    samples = phase.sampler.batch(own)
    return samples, np.arange(len(samples)) + order.samples_before(step)


def test_sets_and_sizes():
    """A phase draws its sets alone, by their weights, in steps of its own size; positions go on without a gap."""
    order, place = batches(), 0
    drawn = {0: [], 1: [], 2: []}
    for step in range(400):
        samples, positions = step_of(order, step)
        assert positions.tolist() == list(range(place, place + len(samples)))
        assert len(set(BUCKETS[samples])) == 1
        place += len(samples)
        drawn[phase_at(order, step).number] += SETS[samples].tolist()
        assert order.samples_before(step + 1) == place
    assert [len(each) for each in drawn.values()] == [7 * 8, 23 * 4, 370 * 2]
    assert set(drawn[0]) == {0} and set(drawn[1]) == {0, 1} and set(drawn[2]) == {1, 2}
    assert np.mean(np.array(drawn[1]) == 1) == pytest.approx(0.75, abs=0.06)
    assert np.mean(np.array(drawn[2]) == 1) == pytest.approx(0.5, abs=0.02)


def test_streams_go_on():
    """A set is drawn on where the phase before left it: no clip comes again before all of its bucket have come."""
    mixes = [{"small": 1}, {"small": 3, "large": 1}, {"small": 1, "large": 5}, {"images": 1}]
    order = batches([{"from": at, "sets": sets} for at, sets in zip((0, 3, 5, 60), mixes, strict=True)])
    counts = Counter()
    for step in range(60):
        counts.update(step_of(order, step)[0].tolist())
        for first, last in ((40, 70), (70, 90)):  # of the small clips, those of each bucket
            own = [counts[clip] for clip in range(first, last)]
            assert max(own) - min(own) <= 1


def test_seek():
    """A step is the same whichever were asked for before it, and whatever later entries say."""
    order = batches()
    whole = [step_of(order, step) for step in range(80)]
    for step in (79, 30, 29, 7, 6, 0, 31):
        for one, other in zip(step_of(batches(), step), whole[step], strict=True):
            assert one.tolist() == other.tolist()
    other = batches([*SCHEDULE[:2], {"from": 40, "sets": {"large": 1}}])
    assert all(step_of(other, step)[0].tolist() == whole[step][0].tolist() for step in range(30))


def test_one_entry():
    """A schedule with one entry is the mixture with these weights."""
    order = batches([{"from": 0, "sets": {"images": 1, "small": 2, "large": 1}}])
    plain = BatchSampler(BUCKETS, batch_size=4, seed=0, sets=SETS, shares=(1, 2, 1))
    assert all(step_of(order, step)[0].tolist() == plain.batch(step).tolist() for step in range(60))


def test_packs():
    """Packs in phases: their sets alone, positions without a gap, and a set goes on with the next epoch."""
    order, place = (
        packs([{"from": at, "sets": sets} for at, sets in ((0, {"images": 1}), (4, {"small": 1, "large": 1}))]),
        0,
    )
    for step in range(40):
        samples, positions = step_of(order, step)
        assert sorted(positions) == list(range(place, place + len(samples)))
        assert set(SETS[samples]) <= ({0} if step < 4 else {1, 2})
        place += len(samples)
    assert order.samples_before(40) == place
    first = order.phases[0].sampler
    assert [first.drawn(step) for step in (0, 1, 2, 3)] == [[0], [40], [40], [80]]  # two steps of 24 are an epoch
    assert order.phases[1].before == first.samples_before(4)


def test_counts():
    """How many items of each stream came, against counting them."""
    from fractions import Fraction

    order = Interleave([Fraction(5, 3), Fraction(7, 2), Fraction(1, 6)], 0, 9)
    chosen, _ = order.items(0, 200)
    for items in (0, 1, 5, 6, 37, 199):
        assert order.counts(items) == np.bincount(chosen[:items], minlength=3).tolist()


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ([], "must be a list of entries"),
        ({"from": 0}, "must be a list of entries"),
        ([{"from": 0, "sets": {"images": 1}, "weights": 1}], r"data\.schedule\[0\]\.weights is no key of an entry"),
        ([{"sets": {"images": 1}}], r"data\.schedule\[0\]\.from=None must be a step"),
        ([{"from": 0, "sets": {"images": 1}, "batch_size": 0}], r"batch_size=0 must be a whole number above 0"),
        ([{"from": 0}], r"data\.schedule\[0\]\.sets=None must give weights by set: \{images: 1, small: 1, large: 1\}"),
        ([{"from": 0, "sets": {"cats": 1}}], r"sets\.cats: there is no such set; data\.sets has images, small, large"),
        ([{"from": 0, "sets": {"images": -1}}], r"sets\.images=-1 must be a number, at least 0"),
        ([{"from": 0, "sets": {"images": 0}}], "draws nothing"),
        ([{"from": 5, "sets": {"images": 1}}], r"data\.schedule\[0\]\.from=5 must be 0"),
        ([{"from": 0, "sets": {"images": 1}}] * 2, r"data\.schedule\[1\]\.from=0 must be above 0"),
        ([{"from": 0, "sets": {"images": 1, "small": 1}}], r"data\.sets\.large is drawn by no entry"),
    ],
)
def test_refused(schedule, said):
    with pytest.raises(ValueError, match=said):
        read_schedule(schedule, NAMES)


def test_past():
    """What has been trained stays; what is to come may change."""
    before = read_schedule(SCHEDULE, NAMES)
    later = read_schedule([*SCHEDULE[:2], {"from": 20, "sets": {"large": 1}}], NAMES)
    check_past(before, later, 20)
    check_past(before, before, 10**6)
    with pytest.raises(
        ValueError, match=r"data\.schedule\[2\] has changed: none -> \{from 20, large: 1\}, and 21 steps"
    ):
        check_past(before, later, 21)
    with pytest.raises(
        ValueError,
        match=r"data\.schedule\[0\] has changed: \{from 0, images: 1, batch_size 8\} -> \{from 0, images: 1\}",
    ):
        check_past(before, [Entry(0, before[0].weights), *before[1:]], 1)
    plain = {"sets": {"images": {"weight": 3}, "small": {}}}
    check_past(entries_of(plain), read_schedule([{"from": 0, "sets": {"images": 3, "small": 1}}], plain["sets"]), 9)
