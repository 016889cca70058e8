"""Noise inside a part of an expert's window, and noise of a data set's own: still the exact conditional distribution."""

import pytest
import torch

from wantrain import flow
from wantrain.batch import Batch
from wantrain.losses import FlowMatching, MinSNR
from wantrain.util.seeds import generator_at


def batch(sets=(), size=4):
    latents = torch.randn(size, 2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    return Batch(latents, torch.ones(size, 5, 3), tuple(map(str, range(size))), tuple(range(size)), sets=sets)


def streams(positions):
    return [generator_at(0, "noise", position) for position in positions]


def test_part_of_the_window():
    """min_sigma and max_sigma condition the distribution: shares of draws are those of the whole, divided by the part's
    mass, up to both ends; there is no atom at an end.
    """
    loss = FlowMatching(shift=3.0, high=0.875, min_sigma=0.4, max_sigma=0.7)
    drawn = torch.cat([loss.draw(batch(), streams(range(4 * i, 4 * i + 4))) for i in range(500)])
    assert loss.window == loss.noise.window == flow.NoiseWindow(0.4, 0.7) and loss.window.contains(drawn).all()
    assert len(drawn.unique()) > 1980
    low, high = (flow.window_mass(flow.NoiseWindow(0, end), density="uniform", shift=3.0) for end in (0.4, 0.7))
    for level in (0.45, 0.5, 0.6, 0.68):
        below = flow.window_mass(flow.NoiseWindow(0, level), density="uniform", shift=3.0)
        assert (drawn <= level).double().mean().item() == pytest.approx((below - low) / (high - low), abs=0.035)
    assert loss.mass == pytest.approx(high - low)


def test_one_end():
    """One limit leaves the expert's other end."""
    assert FlowMatching(high=0.875, min_sigma=0.2).window == flow.NoiseWindow(0.2, 0.875)
    assert FlowMatching(low=0.875, max_sigma=0.95).window == flow.NoiseWindow(0.875, 0.95)
    with pytest.raises(ValueError, match=r"^noise\.min_sigma=0\.9: nothing is left of .* \[0\.0, 0\.875\]"):
        FlowMatching(high=0.875, min_sigma=0.9)
    with pytest.raises(ValueError, match=r"^noise\.min_sigma=0\.5, noise\.max_sigma=0\.5: nothing is left"):
        FlowMatching(min_sigma=0.5, max_sigma=0.5)


def test_sets():
    """Each sample draws from its set's distribution and weighs by its set's weighting, at its own position; other sets
    of the batch change nothing of it.
    """
    own = {"cats": {"shift": 8.0, "weighting": MinSNR(3.0)}, "dogs": {"density": "logit_normal", "min_sigma": 0.1}}
    loss = FlowMatching(shift=3.0, high=0.875, weighting="cosmap", sets=own)
    data = batch(("cats", "dogs", "birds", "cats"))
    sigma = loss.draw(data, streams(range(4)))
    alone = {
        "cats": FlowMatching(shift=8.0, high=0.875, weighting=MinSNR(3.0)),
        "dogs": FlowMatching(shift=3.0, high=0.875, density="logit_normal", min_sigma=0.1, weighting="cosmap"),
        "birds": FlowMatching(shift=3.0, high=0.875, weighting="cosmap"),
    }
    for i, name in enumerate(data.sets):
        wanted = alone[name].draw(batch(), streams(range(4)))[i]
        assert sigma[i] == wanted
        assert loss.weight(data, sigma)[i] == alone[name].noise.weight(wanted)
    assert loss.noise == alone["birds"].noise and torch.equal(loss.quadrature(8), alone["birds"].quadrature(8))


def test_window_of_all_sets():
    """The loss's window holds what any set draws: it is what safeguards check."""
    loss = FlowMatching(high=0.875, min_sigma=0.5, sets={"cats": {"min_sigma": 0.1, "max_sigma": 0.2}})
    assert loss.window == flow.NoiseWindow(0.1, 0.875) and loss.noise.window == flow.NoiseWindow(0.5, 0.875)
    with pytest.raises(ValueError, match=r"^noise\.sets\.cats\.min_sigma=0\.9: nothing is left"):
        FlowMatching(high=0.875, sets={"cats": {"min_sigma": 0.9}})
    with pytest.raises(ValueError, match=r"^noise\.sets\.cats\.huber is unknown; a set has density, shift"):
        FlowMatching(sets={"cats": {"huber": 0.9}})
    with pytest.raises(ValueError, match=r"^noise\.sets\.cats: loss weighting 'cosine' is unknown"):
        FlowMatching(sets={"cats": {"weighting": "cosine"}})
    for own, problem in (({"shift": "far"}, r"cats\.shift=far"), ({"min_sigma": "x"}, "min_sigma=x"), (3, "cats=3")):
        with pytest.raises(ValueError, match=problem):
            FlowMatching(sets={"cats": own})
