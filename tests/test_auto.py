"""memory=auto and swap.blocks=auto: what they choose fits the card, changes no result, and leaves what was given."""

import pytest

from wantrain import auto, config
from wantrain.training.planning.outline import find_clips
from wantrain.util.cards import find_card

A14B = ("model=t2v_a14b", "expert=low_noise", "adapter=lora", "bucket=17x480x832")


def resolved(*overrides, given=()):
    """The memory settings chosen for a dry run, as (recompute, activations, swap.blocks)."""
    cfg = auto.resolve(config.compose("train", [*A14B, "dry_run=true", *overrides]), frozenset(given))
    return cfg.recompute, cfg.activations, cfg.swap.blocks


def planned(*overrides, card):
    """Share of the card that the largest bucket takes."""
    cfg = config.compose("train", [*A14B, *overrides])
    planner = config.forecast(cfg).planner("single")
    clips = find_clips(config.shards(cfg), lambda: None, config.settings(cfg))
    return max(plan.device for plan in planner.plan(clips, "17x480x832")) / find_card(card).memory


def test_fits(capsys):
    """The chosen settings fit, and are said."""
    recompute, activations, swap = resolved("memory=auto", "gpu=rtx4090")
    said = f"memory=auto: recompute={recompute} activations={activations} swap.blocks={swap} for 17x480x832"
    assert said in capsys.readouterr().out
    share = planned(f"recompute={recompute}", f"activations={activations}", f"swap.blocks={swap}", card="rtx4090")
    assert 0.6 < share <= 0.97


def test_given_stays():
    """What was given is not chosen; swap.blocks=auto alone leaves the rest."""
    recompute, activations, swap = resolved("memory=auto", "gpu=rtx4090", "swap.blocks=20", given=["swap.blocks"])
    assert swap == 20 and recompute != "none"
    recompute, activations, swap = resolved("swap.blocks=auto", "gpu=rtx4090", "activations=cpu", given=["swap.blocks"])
    assert (recompute, activations) == ("block", "cpu") and swap >= 3


def test_no_card(capsys, monkeypatch):
    """Without a card the defaults stay, and that is said."""
    monkeypatch.setattr(auto, "planned_card", lambda asked: None)
    assert resolved("memory=auto", "swap.blocks=auto") == ("block", "gpu", 0)
    assert "memory=auto: there is no card to plan for; the defaults stay" in capsys.readouterr().out


def test_nothing_fits(monkeypatch):
    """A run whose clips no exact setting brings onto the card does not start, and hears what would help."""
    monkeypatch.setattr(auto, "planned_card", lambda asked: find_card("4GB"))
    with pytest.raises(ValueError, match=r"nothing fits that leaves results as they are\. 4 GB .* The least is"):
        resolved("memory=auto", "dry_run=false")


def test_nothing_left_to_choose():
    """memory=auto beside all three settings is refused, also where one asks for nothing."""
    given = {"recompute", "activations", "swap.blocks"}
    with pytest.raises(ValueError, match="memory has no effect"):
        resolved("memory=auto", "recompute=none", "activations=gpu", "swap.blocks=0", given=given)
