"""Masks: what each kind knows, how often a mix chooses it, and that all of it is a function of the generator alone."""

import pytest
import torch

from wantrain.masks import DRAWN, LEADING, MaskMix, painted, white_share
from wantrain.util.seeds import generator_at

SHAPE = (17, 32, 48)


def draw(name, seed=0, shape=SHAPE, **settings):
    return DRAWN[name](shape, generator_at(seed, name), **settings).expand(shape)


def frames(known):
    """Which frames are known entirely; none is known in part."""
    assert torch.equal(known.flatten(1).all(1), known.flatten(1).any(1))
    return known.flatten(1).all(1).nonzero().flatten().tolist()


def test_whole_frame_types():
    """The mask types of whole frames mark exactly their frames as known."""
    assert frames(draw("nothing")) == []
    assert frames(draw("image")) == [0]
    assert frames(draw("first_last")) == [0, 16]
    lengths = {len(frames(draw("continuation", seed, frames=(2, 13)))) for seed in range(60)}
    assert lengths == {5, 9, 13}, "4k+1 within the range, ends included"
    assert frames(draw("continuation", shape=(5, 8, 8), frames=(9, 13))) == [0], "a short clip keeps something to make"


@pytest.mark.parametrize("name", DRAWN)
def test_mask_determined_by_seed(name):
    """A mask is a function of its generator alone; random types differ between seeds."""
    masks = [draw(name, seed) for seed in range(8)]
    assert all(torch.equal(mask, draw(name, seed)) for seed, mask in enumerate(masks))
    if name not in {"nothing", "image", "first_last"}:
        assert len({mask.numpy().tobytes() for mask in masks}) > 1
    assert name in LEADING or not any(torch.equal(mask, draw("image")) for mask in masks)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("boxes", 0.01, 0.8), ("brushes", 0.005, 0.7), ("borders", 0.05, 0.9)]
)
def test_regions_known_and_hidden(name, least, most):
    """Masks of regions always leave some pixels known and some hidden."""
    hidden = torch.tensor([(~draw(name, seed)).float().mean() for seed in range(60)])
    assert (hidden > 0).all() and hidden.max() < 1
    assert least < hidden.mean() < most
    touched = sum((~draw(name, seed)).float() for seed in range(60)) > 0
    assert touched.float().mean() > 0.85, "no place is always known, the middle of a picture with borders apart"


def test_box_settings():
    """Boxes have sides in the given range, move, and last for the whole clip as often as set."""
    moved, lasted = 0, 0
    for seed in range(40):
        hidden = ~draw("boxes", seed, count=(1, 1), side=(0.25, 0.5), lasting=0.5)
        there = hidden.flatten(1).any(1)
        lasted += bool(there.all())
        boxes = hidden[there]
        for box in boxes[:: max(1, len(boxes) - 1)]:
            rows, columns = box.any(1).sum().item(), box.any(0).sum().item()
            assert box.sum() == rows * columns and 3 <= rows <= 17 and 5 <= columns <= 25
        moved += not torch.equal(boxes[0], boxes[-1])
    assert moved > 20 and 10 < lasted < 35


def test_borders_fixed_rectangle():
    """Borders leave one rectangle known, the same in all frames."""
    for seed in range(20):
        known = draw("borders", seed)
        assert torch.equal(known[:1].expand(SHAPE), known)
        rows, columns = known[0].any(1), known[0].any(0)
        assert known[0].sum() == rows.sum() * columns.sum() and (~known[0]).any()


def test_mask_mix_weights():
    mix = MaskMix.read({"image": 3, "nothing": 1, "boxes": {"weight": 1, "side": [0.1, 0.2]}, "first_last": 0})
    names = [mix.choose(generator_at(0, "condition", position))[0] for position in range(2000)]
    shares = {name: names.count(name) / len(names) for name in mix.names}
    assert shares == pytest.approx({"image": 0.6, "nothing": 0.2, "boxes": 0.2, "first_last": 0.0}, abs=0.03)
    hidden = ~mix.draw("boxes", SHAPE, generator_at(1))
    assert 0 < hidden.float().mean() < 3 * 0.2**2 + 0.05, "the settings are the mask type's"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"imag": 1}, "mask_types.imag is unknown; choose from nothing, image, first_last"),
        ({"image": -1}, "mask_types.image=-1 must be a weight"),
        ({"image": {"frames": 3}}, "mask_types.image.frames is unknown; it has no settings"),
        ({"boxes": {"variants": 0}}, "mask_types.boxes.variants=0 must be a whole number"),
        ({"boxes": {"sides": 3}}, "mask_types.boxes.sides is unknown; it has count, side, lasting"),
        ({"boxes": {"side": [0.5, 0.2]}}, r"boxes.side=\[0.5, 0.2\] must be \[smallest, largest\]"),
        ({"boxes": {"lasting": 2}}, "lasting=2 must be a probability"),
        ({"continuation": {"frames": [2, 4]}}, "holds no length 4k"),
        ({"image": 0, "nothing": 0}, "all weights are 0"),
    ],
    ids=str,
)
def test_wrong_mask_mix(spec, message):
    with pytest.raises(ValueError, match=message):
        MaskMix.read(spec)


def test_painted_mask_threshold():
    """A pixel is black where its mean in float64 is below half: every sum of three channels, every level of one."""
    levels = torch.arange(256).byte()
    gray = levels.view(1, 1, 256, 1)
    colours = torch.stack([levels, levels.roll(85), levels.roll(170)], dim=-1).view(1, 1, 256, 3)
    for frames in (gray, colours, torch.tensor([[127, 127, 128], [127, 128, 128]]).byte().view(1, 1, 2, 3)):
        wanted = frames.double().mean(dim=-1) < 127.5
        assert torch.equal(painted(frames), wanted) and wanted.any() and not wanted.all()


def test_white_share():
    """The first frame is a latent frame, then four are one; a cell has the mean of its pixels, grey between."""
    frames = torch.zeros(1, 9, 16, 24, 3, dtype=torch.uint8)
    frames[0, 0, :8, :8] = 255  # the first frame: one whole cell
    frames[0, 1:3, 8:, 8:12] = 255  # two of four frames, half a cell
    frames[0, 8, 8, 16] = 255  # the last frame of the last four, one pixel
    wanted = torch.zeros(1, 3, 2, 3)
    wanted[0, 0, 0, 0], wanted[0, 1, 1, 1], wanted[0, 2, 1, 2] = 1, 0.25, 1 / 256
    found = white_share(frames)
    assert torch.equal(found, wanted) and torch.equal(found.half().float(), wanted), "fp16 keeps it exactly"
    assert torch.equal(white_share(frames[:, :1]), wanted[:, :1])
    plain = white_share(torch.full((1, 1, 8, 8, 1), 127, dtype=torch.uint8))
    assert plain.item() == pytest.approx((127 - 8) / 239)
    noisy = torch.tensor([0, 8, 247, 255]).byte().view(4, 1, 1, 1, 1).expand(4, 1, 8, 8, 1)
    assert white_share(noisy).flatten().tolist() == [0, 0, 1, 1]
    strided = white_share(torch.full((1, 5, 32, 32, 1), 255, dtype=torch.uint8), spatial_stride=16)
    assert strided.shape == (1, 2, 2, 2) and (strided == 1).all()
    with pytest.raises(ValueError, match=r"8"):
        white_share(frames[:, :8])
