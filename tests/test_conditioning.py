"""Conditioning inputs: Wan's packing of frames, gray that is encoded, each conditioning type, what shards hold."""

import ast
from pathlib import Path

import pytest
import torch

from wantrain import conditioning
from wantrain.conditioning import (
    ConditioningInput,
    ModelInputs,
    check_given,
    check_type,
    gray_unknown,
    model_inputs,
    pack_mask,
)
from wantrain.masks import DRAWN, PAINTED

ROOT = Path(__file__).resolve().parent.parent


def known(frames=9, size=(16, 32), *, whole=(), batch=1):
    mask = torch.zeros(batch, 1, frames, *size, dtype=torch.bool)
    mask[:, :, list(whole)] = True
    return mask


def rows(mask):
    """The mask channels of each latent frame, where they are the same everywhere."""
    assert torch.equal(mask, mask[..., :1, :1].expand_as(mask))
    return [tuple(row) for row in mask[0, :, :, 0, 0].T.long().tolist()]


def test_mask_packing():
    """The mask packs four frames into one latent frame; the first frame counts four times."""
    nothing, every = (0, 0, 0, 0), (1, 1, 1, 1)
    assert rows(pack_mask(known(whole=[0]))) == [every, nothing, nothing]
    assert rows(pack_mask(known(whole=[0, 8]))) == [every, nothing, (0, 0, 0, 1)], (
        "the last frame is the last of its four"
    )
    assert rows(pack_mask(known(whole=[0, 1, 2, 3, 4, 6]))) == [every, every, (0, 1, 0, 0)]
    assert rows(pack_mask(known(frames=1))) == [nothing]


def test_mask_cell_known():
    """A cell of the mask is known only where all its pixels are known."""
    mask = torch.ones(1, 1, 5, 16, 32, dtype=torch.bool)
    mask[0, 0, 3, 9, 31] = False
    packed = pack_mask(mask)
    assert packed.shape == (1, 4, 2, 2, 4) and packed.dtype == torch.float32
    assert packed.sum() == packed.numel() - 1 and packed[0, 2, 1, 1, 3] == 0
    for bad in (known(frames=8), known(size=(12, 32))):
        with pytest.raises(ValueError, match="nearest valid"):
            pack_mask(bad)


def test_unknown_pixels_gray():
    """Unknown pixels are gray, and the VAE encodes them."""
    pixels, seen = torch.randn(2, 3, 9, 16, 32), []

    def encoder(given):
        seen.append(given)
        return given.new_full((len(given), 16, 3, 2, 4), 0.5)

    made = conditioning.encode(encoder, pixels, known(whole=[0]))
    assert torch.equal(seen[0][:, :, :1], pixels[:, :, :1]) and (seen[0][:, :, 1:] == 0).all()
    assert (made.latents_BCTHW == 0.5).all() and made.mask_BMTHW.shape == (2, 4, 3, 2, 4)
    assert not gray_unknown(pixels, known()).any()


def test_model_inputs():
    record = ConditioningInput(torch.randn(2, 16, 3, 2, 4), pack_mask(known(whole=[0, 8], batch=2)))
    made = model_inputs(record, "channel_concat")
    channels = made.conditioning["concat_BCTHW"]
    assert channels.shape == (2, 20, 3, 2, 4) and made.noised_BT is None and len(made.conditioning) == 1
    assert torch.equal(channels[:, :4], record.mask_BMTHW) and torch.equal(channels[:, 4:], record.latents_BCTHW)
    made = model_inputs(record, "clean_frames")
    assert made.noised_BT.tolist() == [[0, 1, 1]] * 2, "a latent frame known in part is noised"
    assert made.conditioning == {} and made.latents_BCTHW is record.latents_BCTHW
    assert model_inputs(None, "channel_concat") == ModelInputs()
    with pytest.raises(ValueError, match="takes no conditioning besides its text"):
        model_inputs(record, "none")


def test_unknown_conditioning_type():
    for good in ("channel_concat", "clean_frames", "none"):
        check_type(good)
    for bad in ("channels", None):
        with pytest.raises(ValueError, match=f"model.conditioning={bad} is unknown; choose one of channel_concat"):
            check_type(bad)


def test_clean_frames_lead():
    for good in ([], [0], range(5)):
        check_given(known(whole=good), "clean_frames", key="image")
    for bad in ([0, 8], [8]):
        check_given(known(whole=bad), "channel_concat", key="last_image")
        with pytest.raises(ValueError, match=r"last_image: this model takes clean first frames .*no last image"):
            check_given(known(whole=bad), "clean_frames", key="last_image")
    hole = known(whole=range(9))
    hole[..., :8, :8] = False
    with pytest.raises(ValueError, match="no region"):
        check_given(hole, "clean_frames", key="mask")
    with pytest.raises(ValueError, match="video: known frames=3 is not 4k"):
        check_given(known(whole=range(3)), "clean_frames", key="video")


@pytest.mark.parametrize("name", DRAWN)
def test_tensors_round_trip(name):
    """A conditioning input comes back from the tensors of a shard: the mask exactly, the latents in bf16."""
    mask = DRAWN[name]((9, 16, 32), torch.Generator().manual_seed(0))
    made = conditioning.encode(lambda x: torch.randn(len(x), 16, 3, 2, 4), torch.randn(1, 3, 9, 16, 32), mask)
    tensors = conditioning.to_tensors(name, made)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16", "torch.uint8"}
    back = conditioning.from_tensors(name, tensors)
    assert torch.equal(back.mask_BMTHW, made.mask_BMTHW)
    assert torch.equal(back.latents_BCTHW, made.latents_BCTHW.bfloat16().float())
    both = conditioning.stack([back, made])
    assert both.latents_BCTHW.shape == (2, 16, 3, 2, 4) and both.mask_BMTHW.shape == (2, 4, 3, 2, 4)


def test_no_task_names_in_core():
    """No identifier and no string in the loop, the losses or the solvers names a task; docstrings of modules may."""
    tasks = {*DRAWN, PAINTED, "i2v", "ti2v", "t2v", "inpaint", "outpaint", "channel_concat", "clean_frames"} - {
        "nothing"
    }
    files = [*(ROOT / "wantrain/training").rglob("*.py"), *(ROOT / "wantrain/losses").rglob("*.py")]
    files += [ROOT / "wantrain/sampling/solvers.py"]
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.lower() in tasks:
                found.append(f"{file.name}:{node.lineno} {node.value!r}")
            if isinstance(node, ast.Attribute | ast.Name):
                name = (node.attr if isinstance(node, ast.Attribute) else node.id).lower()
                if name in {"image", "first_last", "continuation", "inpaint", "i2v", "ti2v", "t2v"}:
                    found.append(f"{file.name}:{node.lineno} {name}")
    assert len(files) > 20 and found == []
