"""What encode.py stores of what is known, and what each sample of a run is told, for both ways of telling."""

import pytest
import torch

from wantrain.data.latents.conditioning import Conditions

NAMES = ["one", "two"]


def clips(frames=9):
    return torch.randn(2, 3, frames, 16, 32, generator=torch.Generator().manual_seed(frames)).clamp(-1, 1)


def means(pixels):
    """A stand-in for a VAE: each latent is the mean of its pixels, the same in 16 channels; the first frame alone."""
    first = pixels[:, :, :1].mean(dim=(1, 2))[:, None]
    rest = pixels[:, :, 1:].mean(dim=1).unflatten(1, (-1, 4)).mean(dim=2) if pixels.shape[2] > 1 else first[:, :0]
    return torch.nn.functional.avg_pool2d(torch.cat([first, rest], dim=1), 8)[:, None].expand(-1, 16, -1, -1, -1)


def rows_of(conditions, names, pixels, painted=None):
    """What is stored of each clip besides its latents, as clips.py makes it."""
    drawn = [torch.stack(masks) for masks in conditions.draw(names, tuple(pixels.shape[2:]))]
    records = conditions.encode(pixels, drawn, means, painted)
    return [conditions.to_tensors(records, number) for number in range(len(names))]


def test_stored_are_the_latents_of_each_kind_and_variant():
    spec = {"image": 0.5, "boxes": {"weight": 0.5, "variants": 2, "side": [0.3, 0.5]}, "nothing": 0}
    conditions, pixels = Conditions(spec, "channels"), clips()
    rows = rows_of(conditions, NAMES, pixels)
    assert len(rows) == 2
    for row in rows:
        names = {name.removeprefix("condition.").rpartition(".")[0] for name in row}
        assert names == {"image", "boxes", "boxes-1", "nothing"}
    image = conditions.read(("image", 0), rows[1], num_frames=9, position=0)
    expected = means(pixels[1:])
    assert torch.allclose(image.latents_BCTHW[:, :, 0], expected[:, :, 0], atol=1e-2)
    assert (image.latents_BCTHW[:, :, 1:] == 0).all() and image.mask_BMTHW[:, :, 0].all()
    one, other = (conditions.read(("boxes", variant), rows[0], num_frames=9, position=0) for variant in (0, 1))
    assert not torch.equal(one.mask_BMTHW, other.mask_BMTHW)
    known = one.mask_BMTHW.amin(dim=1, keepdim=True).bool().expand_as(one.latents_BCTHW)
    assert torch.allclose(one.latents_BCTHW[known], means(pixels[:1])[known], atol=1e-2), "known cells are the clip's"
    alone = rows_of(conditions, NAMES[1:], pixels[1:])[0]
    assert all(torch.equal(alone[key], rows[1][key]) for key in alone), "a clip's masks do not depend on its company"
    assert conditions.identity() == {
        "image": {"variants": 1},
        "boxes": {"variants": 2, "side": [0.3, 0.5]},
        "nothing": {"variants": 1},
    }


def test_painted_masks_are_taken_from_beside_the_footage():
    painted = torch.ones(2, 1, 9, 16, 32, dtype=torch.bool)
    painted[:, :, :, :, :16] = False
    conditions = Conditions({"mask": 1}, "channels")
    (row, _) = rows_of(conditions, NAMES, clips(), painted)
    record = conditions.read(("mask", 0), row, num_frames=9, position=0)
    assert record.mask_BMTHW[..., 2:].all() and not record.mask_BMTHW[..., :2].any()
    with pytest.raises(ValueError, match="has no mask beside it"):
        conditions.check_clip(9, painted=False)


def test_a_sample_is_told_by_its_place_and_by_weight():
    conditions = Conditions({"image": 3, "boxes": {"variants": 2}}, "channels", seed=5)
    chosen = [conditions.choose(position) for position in range(1000)]
    assert chosen == [conditions.choose(position) for position in range(1000)]
    assert {pick: round(chosen.count(pick) / 1000, 1) for pick in set(chosen)} == pytest.approx(
        {("image", 0): 0.75, ("boxes", 0): 0.125, ("boxes", 1): 0.125}, abs=0.06
    )
    assert [Conditions({"image": 3, "boxes": 1}, "channels", seed=6).choose(p)[0] for p in range(50)] != [
        name for name, _ in chosen[:50]
    ]
    rows = rows_of(conditions, NAMES, clips())
    records = [conditions.read(pick, row, num_frames=9, position=0) for pick, row in zip([("image", 0), ("boxes", 1)], rows, strict=True)]  # fmt: skip
    channels, mask = conditions.tell(records)
    assert channels.shape == (2, 20, 3, 2, 4) and mask is None, "samples of one batch may know different things"


def test_clean_frames_need_nothing_stored():
    conditions = Conditions({"image": 1, "continuation": {"frames": [5, 5]}, "nothing": 1}, "frames")
    assert conditions.stored == [] and conditions.identity() == {}
    assert rows_of(conditions, NAMES, clips()) == [{}, {}]
    tensors = {"latents": torch.randn(16, 3, 2, 4)}
    picks = (("image", 0), ("continuation", 0), ("nothing", 0))
    records = [conditions.read(pick, tensors, num_frames=9, position=3) for pick in picks]
    channels, mask = conditions.tell(records)
    assert channels is None and mask.tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    picture = conditions.read(("image", 0), {"latents": torch.randn(16, 1, 2, 4)}, num_frames=1, position=0)
    assert conditions.tell([picture])[1].tolist() == [[1]], "a single image is learned from its text"
    conditions.check_clip(1, painted=False)


def test_text_alone():
    conditions = Conditions({}, None)
    assert conditions.choose(3) is None and conditions.stored == []
    assert conditions.tell([conditions.read(None, {}, num_frames=9, position=0)]) == (None, None)


def test_what_cannot_be_is_one_clear_error():
    with pytest.raises(
        ValueError, match=r"data.condition.first_last: this model is told by clean first frames; it can"
    ):
        Conditions({"image": 1, "first_last": 1}, "frames", key="data.condition")
    with pytest.raises(ValueError, match="told nothing but text"):
        Conditions({"image": 1}, None)
    with pytest.raises(ValueError, match="makes videos of what is known; give kinds"):
        Conditions({}, "channels")
    with pytest.raises(ValueError, match="is a single image, and this model makes videos"):
        Conditions({"image": 1}, "channels").check_clip(1, painted=False)


def test_a_run_takes_up_what_is_stored_or_says_how_to_store_it():
    stored = Conditions({"image": 1, "boxes": {"variants": 3, "side": [0.2, 0.4]}}, "channels").identity()
    wanted = Conditions({"image": 1, "boxes": 2}, "channels", key="data.condition")
    wanted.adopt(stored, "latents", model="i2v_a14b")
    assert ("boxes", 2) in wanted.stored and {wanted.choose(p) for p in range(99)} == set(wanted.stored)
    for spec, told in (
        ({"first_last": 1}, r"data.condition.first_last is not in latents, .*encode.py model=i2v_a14b 'condition=\{image: 1, boxes: 1, first_last: 1\}'"),
        ({"boxes": {"side": [0.1, 0.4]}}, r"data.condition.boxes with .*0.1, 0.4.* is not in latents"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            Conditions(spec, "channels", key="data.condition").adopt(stored, "latents", model="i2v_a14b")
