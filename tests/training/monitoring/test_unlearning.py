"""The safeguard against a preference run that only unlearns."""

import math

import pytest

from wantrain.training.monitoring.unlearning import SEEN, Unlearning


def seen(watch, ratios, expert="low_noise"):
    return [watch.see(expert, step, math.log(ratio)) for step, ratio in enumerate(ratios, start=1)]


def test_reports_once(capsys):
    """It is reported when the winners' error has risen on average, once, and again only after it had fallen."""
    watch = Unlearning(warn=0.02, stop=None)
    found = seen(watch, [0.9, 1.1] * 10 + [1.05] * 60)
    assert len([row for row in found if row]) == 1 and found[SEEN] is None
    (row,) = [row for row in found if row]
    assert 1.02 < row["winners_over_base"] < 1.05
    assert "their error is 2." in capsys.readouterr().out
    assert not any(seen(watch, [0.9] * 60)) and len([row for row in seen(watch, [1.05] * 90) if row]) == 1


def test_needs_some_steps():
    """A few bad steps at the beginning say nothing."""
    watch = Unlearning(warn=0.01, stop=0.02)
    assert not any(seen(watch, [1.5] * (SEEN - 1)))
    with pytest.raises(ValueError, match=r"low_noise is only unlearning: .* 50\.0% above the base's"):
        watch.see("low_noise", SEEN, math.log(1.5))


def test_experts_apart_and_resume():
    """Each expert has its own mean, which goes on from a checkpoint."""
    whole, parts = (Unlearning(warn=0.02, stop=None) for _ in range(2))
    ratios = [1.0] * 30 + [1.04] * 30
    wanted = seen(whole, ratios)
    seen(parts, ratios[:40])
    seen(parts, [0.5] * 30, expert="high_noise")
    again = Unlearning(warn=0.02, stop=None)
    again.restore(parts.state())
    assert seen(again, ratios[40:]) == wanted[40:] and any(wanted)
    assert not any(seen(Unlearning(warn=None, stop=None), [9.0] * 99)), "null is no limit"
