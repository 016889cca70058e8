"""Loaders: the stored tensors come back, files are held out whole, randomness is by position, damage is an error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_helpers import encode, shard

from wantrain import geometry
from wantrain.data import (
    BatchSampler,
    ConditioningInputs,
    LatentData,
    PixelData,
    read_manifest,
)
from wantrain.data.footage.video_shards import read_video_shards
from wantrain.data.latents.index import Index
from wantrain.data.loading.holdout import split_groups
from wantrain.data.loading.views import view_of
from wantrain.data.shards import describe_file
from wantrain.demo.footage import draw_shot, make_footage
from wantrain.video import to_pixels, write_mp4

SIZES = geometry.Buckets((4096,), (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16), 16)


def encode_texts(texts):
    """A row per letter: different lengths, and the caption can be read back."""
    return [torch.tensor([[ord(letter), 1.0] for letter in text] + [[0.0, 1.0]]) / 256 for text in texts]


def said(text_LD):
    """The caption of `encode_texts`, as far as bfloat16 keeps letters (all below 256 it does)."""
    return "".join(chr(round(256 * row[0].item())) for row in text_LD if row[0] > 0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """12 clips and 2 images, with one file long enough for three windows; English captions only."""
    folder = tmp_path_factory.mktemp("loader")
    make_footage(folder / "footage", num_videos=11, num_images=2)
    for number, text in enumerate(sorted((folder / "footage").glob("*.txt"))):
        text.write_text(f"caption {number}")
    shot = draw_shot(0, seed=9, size=64)
    frames = shot.scene.frames(64, 64, fps=16, num_frames=17) if shot.fps else None
    write_mp4(folder / "footage" / "long.mp4", np.concatenate([frames, frames[::-1], frames]), 16)
    (folder / "footage" / "long.txt").write_text("a long one")
    settings = {"model": "tiny", "num_frames": 17, "fps": 16, "clips": "all", "rejects_limit": 0}
    shard(folder / "footage", folder / "videos", shard_bytes=60_000, **settings)
    return folder / "videos"


@pytest.fixture(scope="module")
def latents(videos):
    out = videos.parent / "latents"
    encode(
        videos,
        out,
        encode_pixels=lambda pixels: pixels[:, :, ::4, ::8, ::8],
        encode_texts=encode_texts,
        sizes=SIZES,
        inputs=ConditioningInputs({}, "none"),
        model="tiny",
        vae_fingerprint="vae",
        text_fingerprint="text",
        rejects_limit=0,
        shard_bytes=1 << 20,
        shard_clips=6,
    )
    return out


@pytest.fixture
def mine(latents, tmp_path):
    """A copy of the latents to spoil."""
    return Path(shutil.copytree(latents, tmp_path / "latents"))


def all_of_one_bucket(data):
    """For each bucket the numbers of its training samples."""
    return [np.flatnonzero(data.buckets == bucket) for bucket in np.unique(data.buckets)]


# ------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.9])
def test_holdout_whole_files(share):
    """A file is held out whole or not at all."""
    sources = np.random.default_rng(0).integers(0, 2**64, 200, dtype=np.uint64)[np.arange(1000) % 200]
    train, held = split_groups(sources, share, seed=0)
    assert sorted([*train, *held]) == list(range(1000))
    assert not set(sources[train].tolist()) & set(sources[held].tolist())
    assert len(set(sources[held].tolist())) == round(share * 200)


def test_holdout_stability():
    """The split is fixed by the seed and changes little with more files."""
    sources = np.random.default_rng(1).integers(0, 2**64, 1000, dtype=np.uint64)
    held = set(sources[split_groups(sources, 0.1, seed=0)[1]].tolist())
    again = np.random.default_rng(2).permutation(sources)
    assert set(again[split_groups(again, 0.1, seed=0)[1]].tolist()) == held
    assert set(sources[split_groups(sources, 0.1, seed=1)[1]].tolist()) != held
    more = np.concatenate([sources, np.arange(100, dtype=np.uint64)])
    assert len(held & set(more[split_groups(more, 0.1, seed=0)[1]].tolist())) > 80
    # The first few are of all kinds, not those that happen to lie in the first shard.
    order = split_groups(np.sort(sources), 0.1, seed=0)[1]
    assert np.abs(np.diff(order)).mean() > 100


def test_invalid_holdout():
    """A holdout share outside [0, 1), or one that holds out all files, is refused."""
    sources = np.arange(4, dtype=np.uint64)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"data\.holdout"):
            split_groups(sources, share, seed=0)
    with pytest.raises(ValueError, match="holds out all 4 files"):
        split_groups(sources, 0.95, seed=0)


# ------------------------------------------------------------------------------------------------- latents


def test_stored_tensors_come_back(videos, latents):
    found = read_video_shards(videos, read_manifest(videos, "video"))
    captions = {sample.key: sample.about["caption"] for sample in found}
    data = LatentData(shards=latents, holdout=0, caption_dropout=0)
    manifest = read_manifest(latents, "latent")
    assert len(manifest["shards"]) > 2
    assert len(data.train) == manifest["clips"] == len(data.buckets) == len(data.bucket_names)
    seen = set()
    for samples in all_of_one_bucket(data):
        batch = data.load(samples, range(len(samples)))
        frames, height, width = map(int, data.bucket_names[samples[0]].split("x"))
        shape = (len(samples), 3, (frames + 3) // 4, height // 8, width // 8)
        assert batch.latents_BCTHW.shape == shape
        assert batch.latents_BCTHW.dtype == batch.text_BLD.dtype == torch.float32
        assert batch.positions == tuple(range(len(samples)))
        for name, text in zip(batch.ids, batch.text_BLD, strict=True):
            caption = captions[name[:16]]
            assert said(text) == caption
            assert (text[len(caption) + 1 :] == 0).all()
        seen |= set(batch.ids)
    assert len(seen) == manifest["clips"]
    assert len({name[:16] for name in seen}) == 14


def test_batch_independence(latents):
    """A sample is the same in any batch."""
    data = LatentData(shards=latents, holdout=0)
    samples = max(all_of_one_bucket(data), key=len)
    together = data.load(samples, samples)
    for row, sample in enumerate(samples):
        alone = data.load([sample], [sample])
        torch.testing.assert_close(alone.latents_BCTHW[0], together.latents_BCTHW[row], rtol=0, atol=0)
        length = alone.text_BLD.shape[1]
        torch.testing.assert_close(alone.text_BLD[0], together.text_BLD[row, :length], rtol=0, atol=0)
        assert alone.ids[0] == together.ids[row]


def test_caption_dropout(latents):
    """Captions are dropped by position, at the given rate."""
    data = LatentData(shards=latents, holdout=0, caption_dropout=0.25, seed=3)
    batch = data.load([0] * 2000, range(2000))
    dropped = [said(text) == "" for text in batch.text_BLD]
    assert np.mean(dropped) == pytest.approx(0.25, abs=0.04)
    torch.testing.assert_close(batch.text_BLD[dropped.index(True), 0], data.empty_text[0])
    later = data.load([0] * 100, range(500, 600))
    assert [said(text) == "" for text in later.text_BLD] == dropped[500:600]
    other = LatentData(shards=latents, holdout=0, caption_dropout=0.25, seed=4).load([0] * 100, range(100))
    assert [said(text) == "" for text in other.text_BLD] != dropped[:100]
    for rate in (0.0, 1.0):
        batch = LatentData(shards=latents, holdout=0, caption_dropout=rate).load([0] * 50, range(50))
        assert {said(text) == "" for text in batch.text_BLD} == {bool(rate)}
    with pytest.raises(ValueError, match=r"data\.caption_dropout=1\.5"):
        LatentData(shards=latents, caption_dropout=1.5)


def test_caption_dropout_schedule(latents):
    """Points [step, share] with straight lines between; a step is batch_size places of the run."""
    points = [[10, 1.0], [20, 0.0], [40, 0.5]]
    data = LatentData(shards=latents, holdout=0, caption_dropout=points, batch_size=50, seed=3)
    shares = {0: 1.0, 10: 1.0, 15: 0.5, 20: 0.0, 25: 0.125, 30: 0.25, 40: 0.5, 1000: 0.5}
    for step, share in shares.items():
        assert data.caption_dropout.at(50 * step) == data.caption_dropout.at(50 * step + 49) == pytest.approx(share)
        batch = data.load([0] * 50, range(50 * step, 50 * step + 50))
        assert np.mean([said(text) == "" for text in batch.text_BLD]) == pytest.approx(
            share, abs=0.17 * (0 < share < 1)
        )
    constant = LatentData(shards=latents, holdout=0, caption_dropout=[[0, 0.25]], batch_size=50, seed=3)
    plain = LatentData(shards=latents, holdout=0, caption_dropout=0.25, seed=3)
    assert torch.equal(constant.load([0] * 50, range(50)).text_BLD, plain.load([0] * 50, range(50)).text_BLD)


@pytest.mark.parametrize(
    "wrong", [1.5, [], [[0, 2.0]], [[5, 0.1], [5, 0.2]], [[-1, 0.1]], [[0, 0.1, 3]], [0.1, 0.2], "x"]
)
def test_wrong_caption_dropout(latents, wrong):
    """What is no share and no schedule is refused by its key."""
    with pytest.raises(ValueError, match=r"^data\.caption_dropout="):
        LatentData(shards=latents, caption_dropout=wrong)


def test_heldout_clips(latents):
    """Held-out clips are never trained on and keep their captions."""
    data = LatentData(shards=latents, holdout=0.3, caption_dropout=1.0)
    assert len(data.train) + len(data.heldout) == data.manifest["clips"]
    batches = data.heldout_batches(100)
    held = {name for batch in batches for name in batch.ids}
    assert len(held) == len(data.heldout)
    assert len({name[:16] for name in held}) == round(0.3 * 14)
    trained = {name for samples in all_of_one_bucket(data) for name in data.load(samples, samples).ids}
    assert not {name[:16] for name in held} & {name[:16] for name in trained}
    assert all(said(text) for batch in batches for text in batch.text_BLD)
    assert sum(len(batch) for batch in data.heldout_batches(2)) == 2
    assert LatentData(shards=latents, holdout=0).heldout_batches(4) == []
    captions = data.captions()
    assert len(set(captions)) == len(captions)
    assert set(captions) >= {said(text) for batch in batches for text in batch.text_BLD}


def test_view_is_the_clip(latents):
    """A clip looked at by its name is the one that was trained on, with its caption and bucket."""
    data = LatentData(shards=latents, holdout=0, caption_dropout=0)
    for sample in range(len(data.train)):
        batch = data.load([sample], [sample])
        view = data.view(batch.ids[0])
        assert view == view_of(batch.latents_BCTHW[0], said(batch.text_BLD[0]), data.bucket_names[sample])
    assert data.view("no-such-clip") is None and data.view("x" * 99) is None


def test_sampler_epoch(latents):
    """A sampler over the loader loads every sample once per epoch."""
    data = LatentData(shards=latents, holdout=0.2, caption_dropout=0)
    plan = BatchSampler(data.buckets, batch_size=1, seed=0)
    names = [data.load(plan.batch(step), [step]).ids[0] for step in range(len(data.train))]
    assert sorted(names) == sorted(data.index.name(int(sample)) for sample in data.train)


def respoil(folder):
    """Make the manifest agree with what lies there now: damage that was there before the hashes were taken."""
    manifest = read_manifest(folder, "latent")
    for key in ("shards", "text_shards", "files"):
        manifest[key] = [{**row, **describe_file(folder / row["name"])} for row in manifest[key]]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def overwrite(folder, sample, content, at):
    """Put `content` into a sample's safetensors member, `at` bytes from its end."""
    manifest = read_manifest(folder, "latent")
    index = Index.read(folder / manifest["files"][0]["name"])
    path = folder / manifest["shards"][index.shard[sample]]["name"]
    whole = bytearray(path.read_bytes())
    end = int(index.offset[sample] + index.size[sample]) - at
    whole[end : end + len(content)] = content
    path.write_bytes(whole)
    return path.name, index.name(sample)


@pytest.mark.parametrize("kind", ["shards", "text_shards", "files"])
@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_damaged_folder(mine, kind, damage):
    """Damage is detected when the folder is opened."""
    name = read_manifest(mine, "latent")[kind][-1]["name"]
    content = bytearray((mine / name).read_bytes())
    if damage == "cut":
        del content[len(content) // 2 + 1 :]
    content[len(content) // 2] ^= 1
    (mine / name).write_bytes(content)
    if damage == "gone":
        (mine / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is (damaged|missing).*encode\.py"):
        LatentData(shards=mine)


@pytest.mark.parametrize("infinity", [b"\xc0\x7f", b"\x80\x7f"])
def test_nan_and_infinity(mine, infinity):
    """Latents with NaN or infinity are refused with an error that names the clip."""
    shard, name = overwrite(mine, 3, infinity, at=2)
    respoil(mine)
    data = LatentData(shards=mine, holdout=0)
    with pytest.raises(ValueError, match=rf"{shard}, {name}: .*NaN or infinity"):
        data.load([3], [0])
    data.load([2], [0])


def test_broken_member(mine):
    """A broken member of a tar is refused with an error that names the clip."""
    size = int(LatentData(shards=mine).index.size[3])
    shard, name = overwrite(mine, 3, b"\xff" * 8, at=size)  # a header of 2^64 bytes
    respoil(mine)
    with pytest.raises(ValueError, match=rf"{shard}, {name}: damaged"):
        LatentData(shards=mine, holdout=0).load([3], [0])


def test_latent_shape(mine):
    """Latents with another shape than their bucket are refused."""
    manifest = read_manifest(mine, "latent")
    (mine / "manifest.json").write_text(json.dumps({**manifest, "buckets": manifest["buckets"][::-1]}))
    with pytest.raises(ValueError, match=r"latents \(3, .* \(expected \(3, "):
        LatentData(shards=mine, holdout=0).load([0], [0])


def test_wrong_folder(videos, tmp_path):
    """A folder without latent shards is refused with an error that names encode.py."""
    with pytest.raises(ValueError, match=r"latent shards are needed.*encode\.py"):
        LatentData(shards=videos)
    with pytest.raises(ValueError, match=r"holds no shards.*encode\.py"):
        LatentData(shards=tmp_path / "absent")


# ------------------------------------------------------------------------------------------------- pixels


@pytest.fixture(scope="module")
def pixels(videos):
    return PixelData(shards=videos, num_frames=9, area=4096, multiple=16, holdout=0.2, seed=1)


def test_pixel_buckets(pixels, latents):
    """Pixel batches are clips in the sizes of the buckets."""
    assert len(pixels.train) + len(pixels.heldout) == pixels.manifest["clips"]
    assert set(pixels.bucket_names) <= {f"{frames}x{h}x{w}" for h, w in SIZES.sizes(1)[0] for frames in (1, 9)}
    for samples in all_of_one_bucket(pixels):
        batch = pixels.load(samples, samples)
        frames, height, width = map(int, pixels.bucket_names[samples[0]].split("x"))
        assert batch.pixels_BCFHW.shape == (len(samples), 3, frames, height, width)
        assert batch.pixels_BCFHW.abs().max() <= 1 and batch.positions == tuple(samples)


def test_pixel_clip_start(pixels):
    """The start of a sample within its clip is drawn by position."""
    sample = pixels.bucket_names.index("9x64x64")
    one, again = (pixels.load([sample], [5]).pixels_BCFHW for _ in range(2))
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    whole = to_pixels(pixels.clips[pixels.train[sample]])
    starts = set()
    for position in range(60):
        clip = pixels.load([sample], [position]).pixels_BCFHW[0]
        starts |= {start for start in range(9) if torch.equal(clip[:, 0], whole[:, start])}
    assert starts == set(range(9))


def test_pixel_holdout(pixels, latents):
    """PixelData holds out the files that LatentData holds out."""
    held = {name for batch in pixels.heldout_batches(100) for name in batch.ids}
    data = LatentData(shards=latents, holdout=0.2, seed=1)
    assert held == {name for batch in data.heldout_batches(100) for name in batch.ids}
    for batch in pixels.heldout_batches(3):
        first = pixels.clips[pixels.names.index(batch.ids[0])][: batch.pixels_BCFHW.shape[2]]
        torch.testing.assert_close(batch.pixels_BCFHW[0], to_pixels(first), rtol=0, atol=0)
        assert batch.positions == ()


def test_pixel_memory_limit(videos):
    """Pixels that exceed data.max_gb are refused."""
    with pytest.raises(ValueError, match=r"data\.max_gb=0\.001"):
        PixelData(shards=videos, num_frames=9, area=4096, multiple=16, max_gb=0.001)
