"""The recipes for memory: each fits its card by the planner, says what it takes, and has no setting too many."""

import functools
import re
from dataclasses import replace

import pytest

from wantrain import config
from wantrain.training.planning.outline import find_clips
from wantrain.training.planning.plan import GB, Choice
from wantrain.training.planning.search import FILL, SEARCHED, fits
from wantrain.util.cards import find_card

A14B = ("model=t2v_a14b", "expert=low_noise")
LORA = (*A14B, "adapter=lora", "adapter.rank=32", "adapter.alpha=32")
SMALL, LARGE, LONG = "81x480x832", "81x720x1280", "121x704x1280"
#: Recipe, what it is composed with, the largest clip, the card and most GB of it, engine and processes.
RECIPES = [
    ("lora_16gb", LORA, SMALL, "rtx5080", 15.5, "single", 1),
    ("lora_24gb", LORA, SMALL, "rtx4090", 23.0, "single", 1),
    ("lora_48gb", LORA, SMALL, "l40s", 46.0, "single", 1),
    ("lora_80gb", LORA, SMALL, "h100", 76.0, "single", 1),
    ("lora_24gb_720p", LORA, LARGE, "rtx4090", 23.0, "single", 1),
    ("lora_80gb_720p", LORA, LARGE, "h100", 80.0, "single", 1),
    ("lora_5b_12gb", ("recipe=ti2v_5b_lora",), LONG, "rtx4070", 12.0, "single", 1),
    ("full_5b_80gb", ("model=ti2v_5b", "expert=dense"), LONG, "h100", 80.0, "single", 1),
    ("full_14b_1x141gb", A14B, SMALL, "h200", 130.0, "single", 1),
    ("full_14b_8x80gb", A14B, SMALL, "h100", 70.0, "fsdp2", 8),
]
names = pytest.mark.parametrize("row", RECIPES, ids=lambda row: row[0])


@functools.cache
def planned(row):
    """The planner of a recipe and the cases of its largest clip."""
    name, words, bucket, _, _, engine, processes = row
    recipes = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
    others = [word for word in words if not word.startswith("recipe=")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(processes))
        chosen = f"recipe={','.join([*recipes, name])}"
        cfg = config.compose("train", [*others, chosen, f"bucket={bucket}", f"batch_size={processes}"])
        planner = config.forecast(cfg).planner(engine)
    clips = find_clips(config.shards(cfg), lambda: None, config.settings(cfg))
    if words == LORA:  # memory settings change no case
        return planner, traced(words, bucket)
    return planner, [*planner.cases(clips, bucket).values()]


@functools.cache
def traced(words, bucket):
    """The cases of a largest clip without a recipe."""
    cfg = config.compose("train", [*words, f"bucket={bucket}", "batch_size=1"])
    clips = find_clips(config.shards(cfg), lambda: None, config.settings(cfg))
    return [*config.forecast(cfg).planner("single").cases(clips, bucket).values()]


@names
def test_fits(row):
    """What the planner counts fits the card and its limit, and is what the recipe's header says."""
    planner, (case,) = planned(row)
    memory = case.plan(planner.asked)
    assert memory.device <= row[4] * GB and fits(memory, find_card(row[3]))
    text = (config.CONF / "recipe" / f"{row[0]}.yaml").read_text(encoding="utf-8")
    figures = [float(each) for each in re.findall(r"([\d.]+) GB (?:on|of pinned)", text.split("Planned")[1])]
    assert figures == [round(memory.device / GB, 1), *([round(memory.host / GB, 1)] if memory.host else [])]
    page = (config.ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    cells = re.search(rf"^\| `{row[0]}` \|[^|]*\|(.*)$", page, flags=re.M)
    assert cells is not None and [float(each) for each in re.findall(r"[\d.]+", cells[1])] == figures


@names
def test_each_setting_is_needed(row):
    """Without one of its memory settings a recipe no longer fits, and the planner advises that one again."""
    planner, cases = planned(row)
    card, default = find_card(row[3]), Choice(recompute="block")
    card = replace(card, memory=min(card.memory, row[4] * GB / FILL))
    for name in ("activations", "inputs", "base", "swap"):
        asked = replace(planner.asked, **{name: getattr(default, name)})
        if asked == planner.asked:
            continue
        assert not fits(cases[0].plan(asked), card), f"{row[0]} fits without {name}"
        advice = replace_asked(planner, asked).advise(cases, card, fixed=set(SEARCHED) - {name})
        assert advice is not None and getattr(advice.choice, name) != getattr(asked, name)


def replace_asked(planner, asked):
    """The planner with other settings."""
    other = replace(planner)
    other.__dict__["asked"] = asked
    return other


@pytest.mark.parametrize("name", ["full_5b_80gb", "full_14b_1x141gb"])
def test_updates_are_needed(name):
    """With float32 weights and moments a full fine-tune does not fit its card; the planner advises the recipe's way."""
    (row,) = (row for row in RECIPES if row[0] == name)
    plain = ("full_14b_8x80gb", *row[1:5], "single", 1)  # sets nothing of weights and moments
    planner, cases = planned(plain)
    card = find_card(row[3])
    assert not fits(cases[0].plan(planner.asked), card)
    advice = planner.advise(cases, card)
    assert advice is not None and {"trained.dtype=bf16", "optimizer=adamw_8bit"} & set(advice.overrides)
