"""Old names on the command line are refused with the new ones; files that hold them are read."""

import pytest

from wantrain.data import check_sets
from wantrain.util.renamed import refuse_old_keys, upgraded_config, upgraded_manifest, upgraded_words


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("idle=cpu", "offload.experts=cpu"),
        ("idle=gpu", "offload.experts=none"),
        ("offload=blocks", "offload.blocks=true"),
        ("offload=none", "offload.blocks=false"),
        ("experts.idle=gpu", "experts.offload=none"),
        ("experts.idle=cpu", "experts.offload=cpu"),
        ("sample.idle=disk", "sample.offload.experts=disk"),
        ("sample.offload=blocks", "sample.offload.blocks=true"),
    ],
)
def test_offload_words(old, new):
    with pytest.raises(ValueError, match=f"is now .*{new}"):
        refuse_old_keys([old])
    assert upgraded_words([old]) == [new]
    refuse_old_keys([new])
    assert upgraded_words([new]) == [new]


@pytest.mark.parametrize("order", [("idle", "offload"), ("offload", "idle")])
def test_offload_config(order):
    """Either order of the two old keys gives one mapping, and today's config stays as it is."""
    old = {"idle": "cpu", "offload": "blocks"}
    new = {"offload": {"experts": "cpu", "blocks": True}}
    assert upgraded_config({key: old[key] for key in order}) == new
    assert upgraded_config({"sample": {key: old[key] for key in order}}) == {"sample": new}
    assert upgraded_config(new) == new and upgraded_config({"sample": new}) == {"sample": new}
    assert upgraded_config({"experts": {"idle": "gpu"}}) == {"experts": {"offload": "none"}}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.told_by=channels", "model.told_by=channels is now model.conditioning=channel_concat"),
        ("data.told_by=null", "data.told_by=null is now data.conditioning=none"),
        ("model.conditioning=null", "model.conditioning=null is now model.conditioning=none"),
        ("data.condition={image: 1}", "data.condition is now data.mask_types: data.mask_types={image: 1}"),
        ("+data.condition.image=1", "data.condition.image is now data.mask_types.image: data.mask_types.image=1"),
        ("model.transformer.attention=plain", "model.transformer.attention=plain is now attention=math"),
        ("attention=sdpa", "attention=sdpa is now attention=auto"),
        ("condition={image: 1}", "condition is now mask_types: mask_types={image: 1}"),
        (
            "data.sets.cats.told_by=frames",
            "data.sets.cats.told_by=frames is now data.sets.cats.conditioning=clean_frames",
        ),
    ],
)
def test_old_word_is_refused(word, message):
    with pytest.raises(ValueError) as raised:
        refuse_old_keys([word])
    assert str(raised.value) == message
    with pytest.raises(ValueError):
        refuse_old_keys(["steps=3", word])


def test_new_words_pass():
    refuse_old_keys(["model.conditioning=none", "data.mask_types={}", "conditioning=x", "data.sets={a: {shards: d}}"])


def test_upgraded_words():
    assert upgraded_words(["data.told_by=null", "condition={}", "steps=3"]) == [
        "data.conditioning=none",
        "mask_types={}",
        "steps=3",
    ]


def test_upgraded_config():
    stored = {
        "model": {"told_by": "channels", "condition": {"image": 1.0}, "name": "tiny_i2v"},
        "data": {"told_by": None, "condition": {}, "sets": {"cats": {"shards": "d", "told_by": "frames"}}},
        "steps": 3,
    }
    assert upgraded_config(stored) == {
        "model": {"conditioning": "channel_concat", "mask_types": {"image": 1.0}, "name": "tiny_i2v"},
        "data": {
            "conditioning": "none",
            "mask_types": {},
            "sets": {"cats": {"shards": "d", "conditioning": "clean_frames"}},
        },
        "steps": 3,
    }


def test_upgraded_manifest():
    stored = {"condition": {"image": {"variants": 1}}, "settings": {"condition": {"image": {"variants": 1}}, "a": 1}}
    assert upgraded_manifest(stored) == {
        "mask_types": {"image": {"variants": 1}},
        "settings": {"mask_types": {"image": {"variants": 1}}, "a": 1},
    }


def test_old_set_key():
    """An old key of a set is refused with the new key."""
    with pytest.raises(ValueError, match=r"data\.sets\.cats\.told_by is now data\.sets\.cats\.conditioning"):
        check_sets({"cats": {"shards": "d", "told_by": "frames"}})


def test_recompute():
    """Gradient checkpointing is recompute=; a number of blocks that keep everything is not taken for a yes or no."""
    with pytest.raises(ValueError, match=r"gradient_checkpointing=true is now recompute=block"):
        refuse_old_keys(["gradient_checkpointing=true"])
    assert upgraded_words(["gradient_checkpointing=false", "recompute=1"]) == ["recompute=none", "recompute=1"]
    stored = {"gradient_checkpointing": True, "model": {"train": {"gradient_checkpointing": False}}}
    assert upgraded_config(stored) == {"recompute": "block", "model": {"train": {"recompute": "none"}}}
    assert upgraded_config({"recompute": 1}) == {"recompute": 1} and upgraded_config({"recompute": 0}) == {
        "recompute": 0
    }
