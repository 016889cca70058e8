"""Conditioning inputs that encode.py stores, and those that each sample of a run gets, for each conditioning type."""

import pytest
import torch

from wantrain.conditioning import ModelInputs
from wantrain.data.latents.conditioning import ConditioningInputs

NAMES = ["one", "two"]


def clips(frames=9):
    return torch.randn(2, 3, frames, 16, 32, generator=torch.Generator().manual_seed(frames)).clamp(-1, 1)


def means(pixels):
    """A stand-in for a VAE: each latent is the mean of its pixels, the same in 16 channels; the first frame alone."""
    first = pixels[:, :, :1].mean(dim=(1, 2))[:, None]
    rest = pixels[:, :, 1:].mean(dim=1).unflatten(1, (-1, 4)).mean(dim=2) if pixels.shape[2] > 1 else first[:, :0]
    return torch.nn.functional.avg_pool2d(torch.cat([first, rest], dim=1), 8)[:, None].expand(-1, 16, -1, -1, -1)


def rows_of(inputs, names, pixels, painted=None):
    """What is stored of each clip besides its latents, as clips.py makes it."""
    drawn = [torch.stack(masks) for masks in inputs.draw(names, tuple(pixels.shape[2:]))]
    records = inputs.encode(pixels, drawn, means, painted)
    return [inputs.to_tensors(records, number) for number in range(len(names))]


def test_stored_mask_types():
    spec = {"image": 0.5, "boxes": {"weight": 0.5, "variants": 2, "side": [0.3, 0.5]}, "nothing": 0}
    inputs, pixels = ConditioningInputs(spec, "channel_concat"), clips()
    rows = rows_of(inputs, NAMES, pixels)
    assert len(rows) == 2
    for row in rows:
        names = {name.removeprefix("condition.").rpartition(".")[0] for name in row}
        assert names == {"image", "boxes", "boxes-1", "nothing"}
    image = inputs.read(("image", 0), rows[1], num_frames=9, position=0)
    expected = means(pixels[1:])
    assert torch.allclose(image.latents_BCTHW[:, :, 0], expected[:, :, 0], atol=1e-2)
    assert (image.latents_BCTHW[:, :, 1:] == 0).all() and image.mask_BMTHW[:, :, 0].all()
    one, other = (inputs.read(("boxes", variant), rows[0], num_frames=9, position=0) for variant in (0, 1))
    assert not torch.equal(one.mask_BMTHW, other.mask_BMTHW)
    known = one.mask_BMTHW.amin(dim=1, keepdim=True).bool().expand_as(one.latents_BCTHW)
    assert torch.allclose(one.latents_BCTHW[known], means(pixels[:1])[known], atol=1e-2), "known cells are the clip's"
    alone = rows_of(inputs, NAMES[1:], pixels[1:])[0]
    assert all(torch.equal(alone[key], rows[1][key]) for key in alone), "a clip's masks do not depend on its company"
    assert inputs.identity() == {
        "image": {"variants": 1},
        "boxes": {"variants": 2, "side": [0.3, 0.5]},
        "nothing": {"variants": 1},
    }


def test_painted_masks():
    painted = torch.ones(2, 1, 9, 16, 32, dtype=torch.bool)
    painted[:, :, :, :, :16] = False
    inputs = ConditioningInputs({"mask": 1}, "channel_concat")
    (row, _) = rows_of(inputs, NAMES, clips(), painted)
    record = inputs.read(("mask", 0), row, num_frames=9, position=0)
    assert record.mask_BMTHW[..., 2:].all() and not record.mask_BMTHW[..., :2].any()
    with pytest.raises(ValueError, match="has no mask beside it"):
        inputs.check_clip(9, painted=False)


def test_mask_type_draw():
    """Mask types are drawn by position, seed and weight."""
    inputs = ConditioningInputs({"image": 3, "boxes": {"variants": 2}}, "channel_concat", seed=5)
    chosen = [inputs.choose(position) for position in range(1000)]
    assert chosen == [inputs.choose(position) for position in range(1000)]
    assert {pick: round(chosen.count(pick) / 1000, 1) for pick in set(chosen)} == pytest.approx(
        {("image", 0): 0.75, ("boxes", 0): 0.125, ("boxes", 1): 0.125}, abs=0.06
    )
    assert [ConditioningInputs({"image": 3, "boxes": 1}, "channel_concat", seed=6).choose(p)[0] for p in range(50)] != [
        name for name, _ in chosen[:50]
    ]
    rows = rows_of(inputs, NAMES, clips())
    records = [inputs.read(pick, row, num_frames=9, position=0) for pick, row in zip([("image", 0), ("boxes", 1)], rows, strict=True)]  # fmt: skip
    made = inputs.model_inputs(records)
    assert made.conditioning["concat_BCTHW"].shape == (2, 20, 3, 2, 4), "samples of one batch may have other mask types"
    assert made.noised_BT is None


def test_clean_frames():
    """The conditioning type clean_frames needs no stored tensors besides the latents."""
    inputs = ConditioningInputs({"image": 1, "continuation": {"frames": [5, 5]}, "nothing": 1}, "clean_frames")
    assert inputs.stored == [] and inputs.identity() == {}
    assert rows_of(inputs, NAMES, clips()) == [{}, {}]
    tensors = {"latents": torch.randn(16, 3, 2, 4)}
    picks = (("image", 0), ("continuation", 0), ("nothing", 0))
    records = [inputs.read(pick, tensors, num_frames=9, position=3) for pick in picks]
    made = inputs.model_inputs(records)
    assert made.conditioning == {} and made.noised_BT.tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    picture = inputs.read(("image", 0), {"latents": torch.randn(16, 1, 2, 4)}, num_frames=1, position=0)
    assert inputs.model_inputs([picture]).noised_BT.tolist() == [[1]], "a single image is learned from its text"
    inputs.check_clip(1, painted=False)


def test_text_alone():
    inputs = ConditioningInputs({}, "none")
    assert inputs.choose(3) is None and inputs.stored == []
    assert inputs.model_inputs([inputs.read(None, {}, num_frames=9, position=0)]) == ModelInputs()


def test_unsupported_mask_types():
    """A mask type that a model cannot take raises an error."""
    with pytest.raises(ValueError, match=r"data.mask_types.first_last: this model takes clean first frames .*it can"):
        ConditioningInputs({"image": 1, "first_last": 1}, "clean_frames", key="data.mask_types")
    with pytest.raises(ValueError, match="takes no conditioning besides its text"):
        ConditioningInputs({"image": 1}, "none")
    with pytest.raises(ValueError, match=r"model.conditioning=camera is unknown; choose one of channel_concat"):
        ConditioningInputs({"image": 1}, "camera")
    assert ConditioningInputs({}, "camera").stored == [], "a type of one's own stores nothing"
    with pytest.raises(ValueError, match=r"needs a conditioning input; give e.g."):
        ConditioningInputs({}, "channel_concat")
    with pytest.raises(ValueError, match="is a single image, and this model makes videos"):
        ConditioningInputs({"image": 1}, "channel_concat").check_clip(1, painted=False)


def test_adopt_stored_variants():
    stored = ConditioningInputs({"image": 1, "boxes": {"variants": 3, "side": [0.2, 0.4]}}, "channel_concat").identity()
    wanted = ConditioningInputs({"image": 1, "boxes": 2}, "channel_concat", key="data.mask_types")
    wanted.adopt(stored, "latents", model="i2v_a14b")
    assert ("boxes", 2) in wanted.stored and {wanted.choose(p) for p in range(99)} == set(wanted.stored)
    for spec, message in (
        ({"first_last": 1}, r"data.mask_types.first_last is not in latents, .*encode.py model=i2v_a14b 'mask_types=\{image: 1, boxes: 1, first_last: 1\}'"),
        ({"boxes": {"side": [0.1, 0.4]}}, r"data.mask_types.boxes with .*0.1, 0.4.* is not in latents"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ConditioningInputs(spec, "channel_concat", key="data.mask_types").adopt(stored, "latents", model="i2v_a14b")
