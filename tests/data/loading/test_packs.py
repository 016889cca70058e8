"""Packs: budgets, epochs, positions and steps, by enumeration."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from wantrain.data import PackSampler
from wantrain.data.loading.packs import plan_packs

#: Tokens of a clip and clips, by bucket: sizes that share no divisor, one bucket of a single clip.
MIX = {3: (1560, 23), 5: (7803, 31), 8: (20281, 17), 9: (32760, 1)}
BUCKETS = np.random.default_rng(0).permutation(np.repeat(list(MIX), [clips for _, clips in MIX.values()]))
TOKENS = {number: tokens for number, (tokens, _) in MIX.items()}


def sampler(budget=65520, passes=4, **more):
    return PackSampler(BUCKETS, TOKENS, budget=budget, passes=passes, seed=7, **more)


def packs_of(plan, steps, world=1):
    """All packs of some steps, in the order of the run."""
    return [
        plan.pack(step, micro_step, rank, world)
        for step in steps
        for micro_step in range(plan.passes // world)
        for rank in range(world)
    ]


@pytest.mark.parametrize("budget", [32760, 40000, 65520, 10**6])
def test_epochs(budget):
    """In each epoch every clip comes once, in another order; no pack exceeds the budget; positions count up by one."""
    plan = sampler(budget, passes=1)
    seen = []
    for epoch in range(3):
        steps = range(epoch * plan.packs_per_epoch, (epoch + 1) * plan.packs_per_epoch)
        packs = packs_of(plan, steps)
        samples = np.concatenate([samples for pack in packs for samples, _ in pack.groups])
        positions = np.concatenate([positions for pack in packs for _, positions in pack.groups])
        assert sorted(samples.tolist()) == list(range(len(BUCKETS)))
        assert positions.tolist() == list(range(epoch * len(BUCKETS), (epoch + 1) * len(BUCKETS)))
        for pack in packs:
            assert 0 < sum(TOKENS[BUCKETS[each]] for own, _ in pack.groups for each in own) <= budget
            assert all(len(set(BUCKETS[own].tolist())) == 1 for own, _ in pack.groups)
        seen.append(samples.tolist())
    assert seen[0] != seen[1] != seen[2]


def test_steps():
    """Every start at a step, on any number of processes, gives the packs that enumeration gives; passes of a step count
    its samples alike; a step may lie in two epochs.
    """
    whole = packs_of(sampler(), range(30))
    assert sampler().packs_per_epoch % 4
    for world in (1, 2, 4):
        for step in (29, 0, 13):
            packs = packs_of(sampler(), [step], world)
            plan, sizes = sampler(), [sum(len(own) for own, _ in pack.groups) for pack in packs]
            for pack, same in zip(packs, whole[step * 4 : step * 4 + 4], strict=True):
                for (own, places), (other, others) in zip(pack.groups, same.groups, strict=True):
                    assert own.tolist() == other.tolist() and places.tolist() == others.tolist()
            assert plan.samples_before(step) == packs[0].groups[0][1][0]
            assert plan.samples_before(step + 1) == plan.samples_before(step) + sum(sizes)
            assert [pack.weight for pack in packs] == pytest.approx([size * 4 / sum(sizes) for size in sizes])
            assert packs[0].most == max(np.reshape(sizes, (-1, world)).sum(axis=0))


def cost_of(pack):
    """What a pack costs, in tokens of linear layers, where attention to 20,000 tokens costs what those do."""
    return sum(len(own) * TOKENS[BUCKETS[own[0]]] * (1 + TOKENS[BUCKETS[own[0]]] / 20_000) for own, _ in pack.groups)


@pytest.mark.parametrize("passes", [2, 4])
def test_packs_of_a_step_cost_alike(passes):
    """Of two steps inside an epoch, no pack of one costs more than all of the other while another costs less; the
    costliest comes first. The step in which an epoch ends and the next begins has the cheapest.
    """
    plan = sampler(passes=passes)
    count, epochs = plan.packs_per_epoch, passes
    costs = [cost_of(pack) for pack in packs_of(plan, range(epochs * count // passes))]
    for epoch in range(epochs):
        first, end = -epoch * count % passes, count - (epoch + 1) * count % passes
        own = costs[epoch * count : (epoch + 1) * count]
        steps = [own[place : place + passes] for place in range(first, end, passes)]
        assert all(step == sorted(step, reverse=True) for step in steps)
        ranked = sorted(steps, reverse=True)
        assert all(min(dear) >= max(cheap) for dear, cheap in pairwise(ranked))
        assert max(own[:first] + own[end:], default=0) <= min(ranked[-1])
        assert passes > 2 or steps != ranked  # they are shuffled


def test_an_epoch_of_less_than_a_step():
    """A step of more packs than an epoch has: still each clip once an epoch."""
    plan = sampler(passes=64)
    assert plan.packs_per_epoch < 64
    samples = np.concatenate([own for pack in packs_of(plan, range(3)) for own, _ in pack.groups])
    clips, whole = len(BUCKETS), len(samples) // len(BUCKETS)
    for epoch in range(whole):
        assert sorted(samples[epoch * clips : (epoch + 1) * clips].tolist()) == list(range(clips))
    assert len(set(samples[whole * clips :].tolist())) == len(samples) - whole * clips


def test_length():
    """Steps of an epoch, samples of a step, and the first and the fullest of the packs."""
    plan = sampler()
    assert plan.steps_for_epochs(2) == -(-2 * plan.packs_per_epoch // 4)
    assert plan.samples_per_step * plan.steps_for_epochs(4) == pytest.approx(4 * len(BUCKETS), rel=0.1)
    assert plan.samples_per_epoch == len(BUCKETS)
    assert plan.first(2).tolist() == plan.pack(0, 0, 0, 1).groups[0][0][:2].tolist()
    most = max(
        sum(TOKENS[BUCKETS[each]] for own, _ in pack.groups for each in own)
        for pack in packs_of(plan, range(plan.packs_per_epoch))
    )
    assert sum(TOKENS[BUCKETS[each]] for own, _ in plan.fullest().groups for each in own) == most


def test_weights_and_sets():
    """A clip of weight 2 comes twice as often as one of weight 1; sets have their shares."""
    weights = np.where(np.arange(len(BUCKETS)) % 2, 2.0, 1.0)
    plan = sampler(weights=weights)
    packs = packs_of(plan, range(plan.steps_for_epochs(40)))
    counts = Counter(np.concatenate([own for pack in packs for own, _ in pack.groups]).tolist())
    odd, even = (np.mean([counts[clip] for clip in range(first, len(BUCKETS), 2)]) for first in (1, 0))
    assert odd / even == pytest.approx(2, rel=0.05)
    sets = np.arange(len(BUCKETS)) % 2
    plan = sampler(sets=sets, shares=(3, 1))
    packs = packs_of(plan, range(plan.steps_for_epochs(40)))
    drawn = np.concatenate([own for pack in packs for own, _ in pack.groups])
    assert (sets[drawn] == 0).mean() == pytest.approx(0.75, abs=0.03)


def test_too_long():
    """A clip of more tokens than a pack may have is an error at the start."""
    with pytest.raises(ValueError, match=r"batch_tokens=32759 is less than the 32760 tokens of the largest clip; give"):
        sampler(32759)


def test_plan_is_close_to_the_bound():
    """No plan takes fewer packs than tokens / budget; these mixes take at most 9 % more, and the clips are all there."""
    random = np.random.default_rng(1)
    for _ in range(20):
        tokens = np.sort(random.choice(np.arange(100, 5000), 8, replace=False))
        counts, budget = random.integers(50, 400, 8), int(3.3 * tokens.max())
        packs = plan_packs(counts, tokens, budget)
        assert packs.sum(axis=0).tolist() == counts.tolist() and (packs @ tokens).max() <= budget
        assert len(packs) * budget <= 1.09 * (counts @ tokens) + budget


def test_one_mix():
    """Where it costs no further packs, all packs are of one mix."""
    packs = plan_packs(np.array([40, 20]), np.array([100, 300]), 500)
    assert packs.tolist() == [[2, 1]] * 20
