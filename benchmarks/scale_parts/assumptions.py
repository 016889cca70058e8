"""What the simulation assumes: one block, each value with its meaning and where it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from wantrain import geometry
from wantrain.util.cards import find_card


def assumed(value: Any, meaning: str, source: str) -> Any:
    """A field with its default, its meaning with the unit, and its source."""
    return dataclasses.field(default=value, metadata={"meaning": meaning, "source": source})


#: GPU-hours between two interruptions: 16,384 H100 over 54 days with 419 that nobody had planned.
LLAMA_3 = round(16_384 * 54 * 24 / 419)
#: The same of OPT-175B: 992 A100, one at least every twelve hours.
OPT_175B = 992 * 12

#: The fewest clips for each process: a hundred steps.
FEWEST = 100
#: Keys that 0 makes sense for; all other numbers are above 0.
CAN_BE_ZERO = {"seed", "slower", "pause", "restart"}


@dataclass(frozen=True)
class Assumptions:
    """Every value that the report depends on and that is not computed by the product's own code."""

    processes: int = assumed(1024, "processes, one for each card", "the question")
    node: int = assumed(8, "cards of a node", "the usual node")
    clips: int = assumed(100_000_000, "clips of the data set", "the question")
    card: str = assumed("h100", "card that is planned for", "data sheet, `wantrain/util/cards.py`")
    pass_tokens: int = assumed(32_760, "tokens of a card's pass where it has several clips", "one clip of 81x480x832")
    pack_clips: int = assumed(1_000_000, "clips whose packs are planned", "choice: planning takes memory, see below")
    pack_steps: int = assumed(16, "steps of packs that are counted", "choice")
    steps_seen: int = assumed(2000, "steps of the whole order that are counted", "choice")
    exchange: float = assumed(
        300e9,
        "bytes per second that a card receives in a gather",
        "8 links of 400 Gbit/s for a node, three quarters used",
    )
    text_tokens: int = assumed(128, "tokens of a caption", "`benchmarks/latents.py`")
    shard_mb: int = assumed(512, "`shard_mb` of encode.py", "its default")
    shard_clips: int = assumed(64, "`shard_clips` of encode.py", "its default")
    cache_gb: float = assumed(100.0, "`data.cache_gb` of train.py, a cache for each node", "its default")
    disk: float = assumed(
        50e9, "bytes per second that the shared disk takes from all nodes", "choice; others in the table"
    )
    hashing: float = assumed(1.5e9, "bytes per second that a process reads back and hashes", "choice")
    slower: float = assumed(
        0.03, "share by which a step is slower while a checkpoint is written", "`benchmarks/checkpoint.json`"
    )
    pause: float = assumed(0.2, "seconds that a save stops training besides the copy", "choice")
    restart: float = assumed(
        600.0, "seconds from a failure to the first step, without reading the checkpoint", "choice"
    )
    rare: float = assumed(LLAMA_3, "GPU-hours between interruptions, rare", "Llama 3: 419 in 54 days on 16,384 cards")
    frequent: float = assumed(
        OPT_175B, "GPU-hours between interruptions, frequent", "OPT-175B: 992 cards, under 12 hours"
    )
    failures: int = assumed(20_000, "failures that the Monte Carlo draws", "choice")
    seed: int = assumed(0, "seed of data order and Monte Carlo", "choice")
    finetune_steps: int = assumed(10_000, "steps of the full fine-tune", "example")
    scratch_cards: int = assumed(64, "cards of `recipe=high_noise_scratch`", "its header")
    sizes: str = assumed(
        "images=1x256x256 video192=81x192x336 video480=81x480x832 video720=81x720x1280",
        "clip of each set of that recipe",
        "its header",
    )

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return self.processes // self.node

    def size_of(self) -> dict[str, str]:
        """The bucket of each set. ValueError for one that is not written so."""
        found = {}
        for word in self.sizes.split():
            name, _, bucket = word.partition("=")
            try:
                geometry.Bucket(*map(int, bucket.split("x")))
            except (TypeError, ValueError) as error:
                raise ValueError(f"sizes={self.sizes}: {word!r} must be set=bucket, e.g. images=1x256x256") from error
            found[name] = bucket
        return found


def read(words: Sequence[str]) -> Assumptions:
    """The assumptions with `key=value` words in place of defaults. ValueError for a key or a value that cannot be."""
    known = {field.name: field for field in fields(Assumptions)}
    given: dict[str, Any] = {}
    for word in words:
        key, found, value = word.partition("=")
        if not found or key not in known:
            raise ValueError(f"{word!r} is no assumption; give key=value with one of {', '.join(known)}")
        given[key] = _read(key, value, known[key].default)
    taken = Assumptions(**given)
    if taken.processes % taken.node or taken.processes % 2:
        raise ValueError(
            f"processes={taken.processes} must be even, and a multiple of node={taken.node}, the cards of a node"
        )
    if taken.clips < FEWEST * taken.processes:
        raise ValueError(
            f"clips={taken.clips} must be at least {FEWEST} for each process: {FEWEST * taken.processes} for "
            f"processes={taken.processes}"
        )
    if not find_card(taken.card).peak:
        raise ValueError(f"card={taken.card}: its speed is not known; give a model, such as h100")
    taken.size_of()
    return taken


def _read(key: str, text: str, default: Any) -> Any:
    """A value of the default's kind. ValueError for one that is no number, or too small."""
    if isinstance(default, str):
        return text
    try:
        number = float(text)
        value = type(default)(number)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{key}={text} must be a number, such as {default}") from error
    least_is_zero = key in CAN_BE_ZERO
    if value != number or not (value >= 0 if least_is_zero else value > 0):
        whole = " whole" if isinstance(default, int) else ""
        raise ValueError(f"{key}={text} must be a{whole} number {'of 0 or more' if least_is_zero else 'above 0'}")
    return value
