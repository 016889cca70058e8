"""Keys of before: refused on the command line with today's, read in stored configs and command lines."""

import pytest

from wantrain.util.renamed import refuse_old_keys, upgraded_config, upgraded_words


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
