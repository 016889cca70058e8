"""The recipes by purpose: each header says what its largest clip takes on three cards, as the planner computes it."""

import os
import re

import pytest

from wantrain import config
from wantrain.training.planning.outline import find_clips
from wantrain.training.planning.plan import GB
from wantrain.training.planning.search import EXACT, SEARCHED
from wantrain.util.cards import find_card

SMALL, LONG = "81x480x832", "121x704x1280"
#: Recipe -> the largest clip that its header speaks of, and its cards.
PURPOSES = {
    **{
        f"{of}{name}": (SMALL, ("rtx4090", "l40s", "h100"))
        for of in ("", "i2v_")
        for name in ("character", "style", "motion")
    },
    "ti2v_5b_lora": (LONG, ("rtx4070", "rtx4090", "h100")),
    "t2v_1_3b_lora": (SMALL, ("rtx4070", "rtx4090", "h100")),
}
#: The figures in a header: all lines of its last paragraph.
BLOCK = re.compile(r"^# Planned .*\n(#            .*\n)+", flags=re.M)


def planned(name):
    """The lines of a recipe's header on memory and time, with memory=auto's settings for each card."""
    bucket, cards = PURPOSES[name]
    cfg = config.compose("train", [f"recipe={name}", f"bucket={bucket}"])
    planner = config.forecast(cfg).planner("single")
    clips = find_clips(config.shards(cfg), lambda: None, config.settings(cfg))
    cases = [*planner.cases(clips, bucket).values()]
    lines = [f"# Planned    clips of {bucket}, memory=auto; estimates, none of it measured on a card:"]
    for card in map(find_card, cards):
        found = planner.advise(cases, card, fixed=set(SEARCHED) - set(EXACT))
        assert found is not None, (name, card.name)
        host = f" and {found.memory.host / GB:.0f} GB of the host" if found.memory.host else ""
        hours = found.seconds * cfg.steps / 3600
        takes = f"{found.memory.device / GB:.0f} GB{host}, {found.seconds:.2g} s per step, {hours:.2g} h"
        lines.append(f"#            {card.name}: {takes}")
    return "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize(
    "name",
    [name if name == "character" else pytest.param(name, marks=pytest.mark.slow) for name in PURPOSES],
)
def test_headers(name):
    """The header of a recipe holds the planner's figures; WANTRAIN_WRITE_DOCS=1 writes them."""
    file = config.CONF / "recipe" / f"{name}.yaml"
    text, lines = file.read_text(encoding="utf-8"), planned(name)
    if os.environ.get("WANTRAIN_WRITE_DOCS"):
        text = (
            BLOCK.sub(lambda _: lines, text)
            if BLOCK.search(text)
            else text.replace("defaults:\n", f"{lines}defaults:\n", 1)
        )
        file.write_text(text, encoding="utf-8")
    block = BLOCK.search(text)
    assert block is not None and block[0] == lines
