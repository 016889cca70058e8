"""Conditioning inputs, from footage with masks through shards and latents into batches.

The encoders are simple on purpose: a latent is a pixel, so a model's inputs can be computed here.
"""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import shard_helpers
import torch

from wantrain import conditioning, geometry
from wantrain.data import (
    ConditioningInputs,
    LatentData,
    MixedData,
    read_manifest,
)
from wantrain.data.footage import survey
from wantrain.data.footage.accounting import MICRO
from wantrain.masks import DRAWN, MaskMix
from wantrain.util.seeds import generator_at
from wantrain.video import write_mp4

SIZE, FRAMES = 64, 17
SIZES = geometry.Buckets((1024,), (1.0,), 16)
SPEC = {"image": 3.0, "nothing": 1.0, "boxes": {"weight": 2.0, "variants": 2}}


def pixel_of_block(pixels_BCTHW):
    return pixels_BCTHW[:, :, ::4, ::8, ::8]


def one_row(texts):
    return [torch.ones(1, 3) * len(text) for text in texts]


def encode(shards, out, spec=SPEC, conditioning="channel_concat", **changes):
    settings = {
        "encode_pixels": pixel_of_block,
        "encode_texts": one_row,
        "sizes": SIZES,
        "inputs": ConditioningInputs(spec, conditioning),
        "model": "tiny",
        "vae_fingerprint": "vae",
        "text_fingerprint": "text",
        "rejects_limit": 0.5,
        "shard_bytes": 1 << 20,
        "shard_clips": 4,
    }
    return shard_helpers.encode(shards, out, **{**settings, **changes})


def never(_):
    raise AssertionError("nothing is to be encoded")


def data_of(folder, spec=SPEC, conditioning="channel_concat", **settings):
    return LatentData(shards=folder, holdout=0, mask_types=spec, conditioning=conditioning, **settings)


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """Six videos of noise that moves; of two there is a mask: a box that moves, and a picture for all frames."""
    folder = tmp_path_factory.mktemp("known")
    (folder / "masks").mkdir()
    generator = np.random.default_rng(0)
    for number in range(6):
        noise = np.kron(generator.integers(0, 256, (8, 13, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        frames = np.stack([noise[:, step : step + SIZE] for step in range(2 * FRAMES)])
        write_mp4(folder / f"{number}.mp4", frames, 16, quality=0)
        (folder / f"{number}.txt").write_text(f"clip {number}")
    mask = np.zeros((2 * FRAMES, SIZE, SIZE, 3), np.uint8)
    for step, frame in enumerate(mask):
        frame[16:48, (16 if step < FRAMES else 32) :] = 255
    write_mp4(folder / "masks" / "0.mp4", mask, 16, quality=0)
    write_mp4(folder / "masks" / "1.mp4", np.broadcast_to(mask[:1], mask.shape), 16, quality=0)
    return folder


def shard(source, out, **changes):
    settings = {"model": "tiny", "num_frames": FRAMES, "fps": 16, "rejects_limit": 0.5, "shard_bytes": 1 << 16}
    return shard_helpers.shard(source, out, **{**settings, **changes})


@pytest.fixture(scope="module")
def videos(footage, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "videos"
    shard(footage, out)
    return out


@pytest.fixture(scope="module")
def latents(videos):
    out = videos.parent / "latents"
    encode(videos, out)
    return out


def pixels_of(data, name):
    """Where the pixels of a clip survive in its latents: every 4th frame, every 8th row and column."""
    (window,) = [n for n in range(len(data.index.ids)) if data.index.name(n) == name]
    (clip,) = [n for n in range(len(data.index)) if window in data.index.windows_of(n)]
    return data._tensors_of(clip, window)["latents"].float()


def test_batch_conditioning_by_formula(latents):
    """Mask, then the latents of the known pixels, mid-gray elsewhere; mask types by weight, masks by the clip's name."""
    data, drawn = data_of(latents), []
    for place in range(400):
        sample = place % len(data.train)
        batch = data.load([sample], [place])
        mask_type = data.inputs.choose(place)
        drawn.append(mask_type)
        name, shape = batch.ids[0], (FRAMES, 32, 32)
        generator = generator_at("known", *mask_type, name)
        known = MaskMix.read(SPEC).draw(mask_type[0], shape, generator).expand(shape)[None, None]
        mask = conditioning.pack_mask(known)
        seen = torch.where(known[:, :, ::4, ::8, ::8], pixels_of(data, name), 0.0)
        assert torch.equal(batch.conditioning["concat_BCTHW"], torch.cat([mask, seen], dim=1))
        assert batch.noised_BT is None
    shares = [np.mean([name == wanted for name, _ in drawn]) for wanted in SPEC]
    assert shares == pytest.approx([0.5, 1 / 6, 1 / 3], abs=0.08)
    assert {variant for name, variant in drawn if name == "boxes"} == {0, 1}


def test_batch_and_worker_independence(videos, latents, tmp_path):
    """Conditioning inputs do not depend on the batch or the number of workers.

    The tars are equal byte for byte for any number of decoders and any batching; a batch, row by row.
    """
    encode(videos, tmp_path / "again", workers=2)
    files = sorted(path.name for path in latents.glob("*.tar"))
    assert files == sorted(path.name for path in (tmp_path / "again").glob("*.tar"))
    assert all((latents / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    data = data_of(latents)
    whole = data.load([3, 1, 4], [10, 11, 12])
    for row, (sample, place) in enumerate([(3, 10), (1, 11), (4, 12)]):
        assert torch.equal(
            whole.conditioning["concat_BCTHW"][row], data.load([sample], [place]).conditioning["concat_BCTHW"][0]
        )


def test_heldout_masks_are_fixed(latents):
    one, other = (
        LatentData(shards=latents, holdout=0.5, mask_types=SPEC, conditioning="channel_concat") for _ in range(2)
    )
    for mine, theirs in zip(one.heldout_batches(4), other.heldout_batches(2), strict=True):
        assert torch.equal(mine.conditioning["concat_BCTHW"][: len(theirs)], theirs.conditioning["concat_BCTHW"])


def test_weights_change_no_latents(videos, latents, tmp_path):
    mine = Path(shutil.copytree(latents, tmp_path / "latents"))
    weights = {**SPEC, "image": 0.1}
    encode(videos, mine, weights, encode_pixels=never, encode_texts=never)
    assert {data_of(mine, weights).inputs.choose(place)[0] for place in range(50)} == {"nothing", "boxes", "image"}
    assert {data_of(mine, {"image": 1}).inputs.choose(place) for place in range(9)} == {("image", 0)}
    with pytest.raises(ValueError, match=r"data\.mask_types\.first_last is not in .*encode again with .*first_last: 1"):
        data_of(mine, {"first_last": 1})
    with pytest.raises(ValueError, match=r"data\.mask_types\.boxes with .*side.* is not in"):
        data_of(mine, {"boxes": {"side": [0.5, 0.6]}})
    encode(videos, mine, {"first_last": 1.0}, encode_texts=never)
    assert read_manifest(mine, "latent")["mask_types"] == {"first_last": {"variants": 1}}
    ends = data_of(mine, {"first_last": 1}).load([0], [0]).conditioning["concat_BCTHW"][0, :4].amax(dim=(2, 3)).T
    assert ends.tolist() == [[1] * 4, [0] * 4, [0] * 4, [0] * 4, [0, 0, 0, 1]]


def test_clean_frames_store_nothing(videos, tmp_path):
    spec = {"image": 1.0, "continuation": {"weight": 1.0, "frames": [5, 9]}, "nothing": 1.0}
    encode(videos, tmp_path / "plain", spec, "clean_frames")
    assert read_manifest(tmp_path / "plain", "latent")["mask_types"] == {}
    data, seen = data_of(tmp_path / "plain", spec, "clean_frames"), set()
    for place in range(60):
        batch = data.load([0, 1], [place, place + 100])
        assert batch.conditioning == {} and batch.noised_BT.shape == (2, 5)
        seen |= {tuple(row) for row in batch.noised_BT.int().tolist()}
    assert seen == {(1, 1, 1, 1, 1), (0, 1, 1, 1, 1), (0, 0, 1, 1, 1), (0, 0, 0, 1, 1)}


def test_text_model_has_no_conditioning(videos, tmp_path):
    encode(videos, tmp_path / "plain", {}, "none")
    batch = data_of(tmp_path / "plain", {}, "none").load([0], [0])
    assert batch.conditioning == {} and batch.noised_BT is None


def test_painted_masks(videos, tmp_path):
    """Masks stay with their footage from shards to batches, and clips without a mask are left out."""
    manifest = read_manifest(videos, "video")
    assert manifest["files_rejected"] == 2, "the masks themselves"
    encode(videos, tmp_path / "painted", {"mask": 1.0}, "channel_concat")
    stats = read_manifest(tmp_path / "painted", "latent")["stats"]
    assert stats["clips"] == {"given": 12, "used": 4, "dropped": {"not for this mask type": 8}}
    assert stats["seconds"]["given"] * MICRO == (stats["seconds"]["used"] + 2 * stats["seconds"]["used"]) * MICRO
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "painted" / "rejects.jsonl").read_text().splitlines()]
    assert len(reasons) == 8 and all("has no mask beside it (masks/NAME.mp4)" in reason for reason in reasons)
    data = data_of(tmp_path / "painted", {"mask": 1.0})
    sources = {f"{source:016x}" for source in data.index.source.tolist()}
    assert len(sources) == 2
    stills = 0
    for sample in range(4):
        batch = data.load([sample], [sample])
        mask = batch.conditioning["concat_BCTHW"][0, :4]
        assert (mask == mask[:1, :1]).all(), "the box stands still within each clip"
        # 64 pixels became 32, so the box covers rows 8 to 24, and columns from 8 (or, later in one clip, 16) on.
        left = 1 if bool((mask[0, 0, 1, 1] == 0).all()) else 2
        stills += left == 1
        wanted = torch.ones(4, 4)
        wanted[1:3, left:] = 0
        assert torch.equal(mask[0, 0], wanted)
        latents = pixels_of(data, batch.ids[0])
        assert torch.equal(batch.conditioning["concat_BCTHW"][0, 4:], torch.where(wanted.bool(), latents, 0.0))
    assert stills == 3


def test_mask_mismatch(footage, tmp_path):
    """A mask with another size or number of frames rejects its file, and the reason has the numbers."""
    source = Path(shutil.copytree(footage, tmp_path / "footage"))
    write_mp4(source / "masks" / "0.mp4", np.zeros((20, SIZE, SIZE, 3), np.uint8), 16)
    write_mp4(source / "masks" / "1.mp4", np.zeros((2 * FRAMES, 32, SIZE, 3), np.uint8), 16)
    shard(source, tmp_path / "videos")
    rows = [json.loads(line) for line in (tmp_path / "videos" / "rejects.jsonl").read_text().splitlines()]
    reasons = {row["name"]: row["reason"] for row in rows}
    assert "its mask masks/0.mp4 has 20 frames, its video 34" in reasons["0.mp4"]
    assert "its mask masks/1.mp4 is 32x64 (height x width), its video 64x64" in reasons["1.mp4"]


def test_bad_masks(footage, tmp_path, monkeypatch):
    """A mask that is damaged or hangs its decoder rejects its file and no other.

    Masks are read to their end in processes that can be killed, as footage is.
    """
    source = shutil.copytree(footage, tmp_path / "footage")
    whole = (source / "masks" / "1.mp4").read_bytes()
    (source / "masks" / "1.mp4").write_bytes(whole[: len(whole) // 2])
    read = survey.read_survey

    def hangs(request):
        if request["name"] == "masks/0.mp4":
            time.sleep(60)
        yield from read(request)

    monkeypatch.setattr(survey, "read_survey", hangs)
    manifest = shard(source, tmp_path / "videos", timeout=1.0)
    rows = (tmp_path / "videos" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    reasons = {row["name"]: row["reason"] for row in map(json.loads, rows)}
    assert manifest["files_used"] == 4
    assert "its mask masks/0.mp4 its decoder gave no clip within 1 s" in reasons["0.mp4"]
    assert "its mask masks/1.mp4 cannot be decoded" in reasons["1.mp4"]


def test_changed_mask(footage, videos, tmp_path):
    """Only clips whose mask changed are encoded again, and those of a set without masks are not."""
    source = Path(shutil.copytree(footage, tmp_path / "footage"))
    encode(videos, tmp_path / "painted", {"mask": 1.0})
    encode(videos, tmp_path / "plain", {"image": 1.0})
    white = np.zeros((2 * FRAMES, SIZE, SIZE, 3), np.uint8)
    white[:, :32] = 255
    write_mp4(source / "masks" / "1.mp4", white, 16, quality=0)
    shard(source, tmp_path / "videos")
    asked = []

    def counting(pixels):
        asked.append(len(pixels))
        return pixel_of_block(pixels)

    encode(tmp_path / "videos", tmp_path / "painted", {"mask": 1.0}, encode_pixels=counting, encode_texts=never)
    assert sum(asked) == 2 * 2, "two clips, each with its conditioning input"
    encode(tmp_path / "videos", tmp_path / "plain", {"image": 1.0}, encode_pixels=never, encode_texts=never)


def test_images_left_out(videos, footage, tmp_path):
    """Images are left out where a model needs videos."""
    from PIL import Image

    source = Path(shutil.copytree(footage, tmp_path / "footage"))
    Image.fromarray(np.full((SIZE, SIZE, 3), 99, np.uint8)).save(source / "picture.png")
    (source / "picture.txt").write_text("a picture")
    shard(source, tmp_path / "videos")
    encode(tmp_path / "videos", tmp_path / "latents", {"image": 1.0})
    (row,) = [json.loads(line) for line in (tmp_path / "latents" / "rejects.jsonl").read_text().splitlines()]
    assert row["name"] == "picture.png (clip 0)" and "is a single image, and this model makes videos" in row["reason"]


def test_mixed_sets_join_conditioning(latents):
    data = MixedData(sets={"a": {"shards": latents}, "b": {"shards": latents}}, holdout=0, mask_types=SPEC,
                     conditioning="channel_concat")  # fmt: skip
    samples = [0, len(data.train) // 2, 1]
    batch = data.load(samples, [5, 6, 7])
    for row, (sample, place) in enumerate(zip(samples, [5, 6, 7], strict=True)):
        assert torch.equal(
            batch.conditioning["concat_BCTHW"][row], data.load([sample], [place]).conditioning["concat_BCTHW"][0]
        )


def test_all_mask_types(videos, tmp_path):
    """Every mask type is stored and read."""
    spec = {**dict.fromkeys(DRAWN, 1.0)}
    encode(videos, tmp_path / "all", spec)
    data = data_of(tmp_path / "all", spec)
    drawn = {data.inputs.choose(place)[0] for place in range(100)}
    assert drawn == set(DRAWN)
    assert all(torch.isfinite(data.load([0], [place]).conditioning["concat_BCTHW"]).all() for place in range(100))
