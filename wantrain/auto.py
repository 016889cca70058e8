"""Memory settings that a run leaves open, memory=auto and swap.blocks=auto: chosen for its card before it starts."""

from __future__ import annotations

from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

from wantrain import config
from wantrain.training.engine.accelerator import engine_asked_for
from wantrain.training.planning.outline import find_clips
from wantrain.training.planning.plan import GB
from wantrain.training.planning.search import EXACT
from wantrain.util.cards import planned_card
from wantrain.util.console import say


def resolve(cfg: DictConfig, given: Iterable[str]) -> DictConfig:
    """The config with values for the settings left open: the fastest with which the largest bucket fits the card, which
    is the smallest here, or with dry_run the one of gpu=. Without a card they keep their defaults.

    given   keys that the command line or a recipe sets, which stay

    ValueError if no values fit, or all are given; a dry run keeps the defaults where none fit, and says what else would
    help.
    """
    free = _open(cfg, given)
    if not free:
        return cfg
    cfg = cfg.copy()
    if cfg.swap.blocks == "auto":
        cfg.swap.blocks = 0
    asked = "memory=auto" if cfg.memory == "auto" else "swap.blocks=auto"
    card = None if cfg.device == "cpu" and not cfg.gpu else planned_card(cfg.gpu)
    planner = None if card is None else config.forecast(cfg).planner(engine_asked_for())
    if card is None or planner is None:
        say(f"{asked}: there is no card to plan for; the defaults stay")
        return cfg
    clips = find_clips(config.shards(cfg), lambda: config.build(cfg.data), config.settings(cfg))
    choice = planner.choose(clips, card, free)
    if choice is None:
        if not cfg.dry_run:
            raise ValueError(f"{asked}: nothing fits that leaves results as they are. {planner.advice(clips, card)}")
        return cfg
    chosen = {EXACT[name]: getattr(choice, name) for name in free}
    for key, value in chosen.items():
        OmegaConf.update(cfg, key, value)
    words = " ".join(f"{key}={value}" for key, value in chosen.items())
    say(f"{asked}: {words} for {planner.largest(clips)} on {card.name} ({card.memory / GB:.4g} GB)")
    return cfg


def _open(cfg: DictConfig, given: Iterable[str]) -> list[str]:
    """The settings that are to be chosen, by their names in a plan."""
    if cfg.memory == "auto":
        taken = set(given) - ({"swap.blocks"} if cfg.swap.blocks == "auto" else set())
        if free := [name for name, key in EXACT.items() if key not in taken]:
            return free
        raise ValueError("memory has no effect: recompute, activations and swap.blocks are all given")
    return ["swap"] if cfg.swap.blocks == "auto" else []
