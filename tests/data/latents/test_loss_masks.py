"""Masks that weigh the loss: from footage through shards and latents into batches, cropped and resized with their clip."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import shard_helpers
import torch
from PIL import Image

from wantrain import geometry
from wantrain.data import ConditioningInputs, LatentData, MixedData, read_manifest
from wantrain.losses import FlowMatching
from wantrain.training.monitoring import loss_masks
from wantrain.video import write_mp4

HEIGHT, WIDTH, FRAMES = 64, 96, 17
SIZES = geometry.Buckets((1024,), (1.0,), 16)


def encode(shards, out, spec=None, **changes):
    settings = {
        "encode_texts": shard_helpers.one_row,
        "sizes": SIZES,
        "inputs": ConditioningInputs(spec or {}, "channel_concat" if spec else "none"),
        "rejects_limit": 0.5,
        "shard_clips": 4,
        "loss_mask": True,
    }
    return shard_helpers.encode(shards, out, **{**settings, **changes})


def shard(source, out):
    return shard_helpers.shard(source, out, num_frames=FRAMES, fps=16, rejects_limit=0.5, shard_bytes=1 << 16)


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """Four videos and an image. a: two clips, with a mask video: white on the left in the first frame of each, all black
    in the second clip but for its last frame; b: a picture for all frames, white below; c: all black; d: no mask;
    e: an image, white on the right.
    """
    folder = tmp_path_factory.mktemp("weighing")
    (folder / "masks").mkdir()
    generator = np.random.default_rng(0)
    for name, frames in {"a": 2 * FRAMES, "b": FRAMES, "c": FRAMES, "d": FRAMES}.items():
        noise = np.kron(generator.integers(0, 256, (8, 20, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        write_mp4(folder / f"{name}.mp4", np.stack([noise[:, i : i + WIDTH] for i in range(frames)]), 16, quality=0)
        (folder / f"{name}.txt").write_text(f"clip {name}")
    Image.fromarray(noise[:, :WIDTH]).save(folder / "e.png")
    (folder / "e.txt").write_text("clip e")
    moving = np.zeros((2 * FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    moving[:1, :, : WIDTH // 2] = moving[5:7, :, : WIDTH // 2] = 255
    moving[-1, : HEIGHT // 2] = 255
    write_mp4(folder / "masks" / "a.mp4", moving, 16, quality=0)
    below, right = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    below[HEIGHT // 2 :] = 255
    right[:, WIDTH // 2 :] = 255
    Image.fromarray(below).save(folder / "masks" / "b.png")
    Image.fromarray(right).save(folder / "masks" / "e.png")
    write_mp4(folder / "masks" / "c.mp4", np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8), 16, quality=0)
    return folder


@pytest.fixture(scope="module")
def videos(footage):
    shard(footage, footage.parent / "videos")
    return footage.parent / "videos"


@pytest.fixture(scope="module")
def latents(videos):
    encode(videos, videos.parent / "latents")
    return videos.parent / "latents"


def source_of(data, clip):
    """The file and the window that a clip of a batch was cut from."""
    name = data.index.name(data.index.windows_of(clip)[0])
    for tar in sorted(data.folder.glob("latent-*.tar")):
        content = tar.read_bytes()
        place = content.find(f"{name}.json".encode())
        if place >= 0:
            row = content[place + 512 :].split(b"\0", 1)[0]
            return json.loads(row)["source"], name[-4:]
    raise AssertionError(name)


def masks_of(data):
    """(mask (T, H, W) or None, row) of every clip, by file and window."""
    found = {}
    for sample in range(len(data.train)):
        batch = data.load([sample], [sample])
        found[source_of(data, batch.clips[0])] = None if batch.mask_BTHW is None else batch.mask_BTHW[0]
    return found


def test_masks_in_batches(latents):
    """A 96x64 file is scaled to 48x32 and cropped to 32x32, and so is its mask: of three blocks of columns the middle
    two thirds are seen. The first frame is a latent frame of its own, then four are one.
    """
    found = masks_of(LatentData(shards=latents, holdout=0))
    assert set(found) == {
        ("a.mp4", "0000"), ("a.mp4", "0001"), ("b.mp4", "0000"), ("c.mp4", "0000"), ("d.mp4", "0000"), ("e.png", "0000")
    }  # fmt: skip
    first, second = found["a.mp4", "0000"], found["a.mp4", "0001"]
    left, above = torch.zeros(4, 4), torch.zeros(4, 4)
    left[:, :2], above[:2] = 1, 1
    near = {"rtol": 0, "atol": 0.02}  # bicubic scaling rounds the edge over a pixel
    wanted = torch.stack([left, 0 * left, left / 2, 0 * left, 0 * left])
    torch.testing.assert_close(first, wanted, **near)
    assert (first[1] == 0).all() and (first[:, :, 3] == 0).all() and (first[0, :, 0] == 1).all()
    torch.testing.assert_close(second, torch.stack([*torch.zeros(4, 4, 4), above / 4]), **near)
    torch.testing.assert_close(found["b.mp4", "0000"], (1 - above).expand(5, 4, 4), **near)
    assert (found["c.mp4", "0000"] == 0).all() and found["d.mp4", "0000"] is None
    torch.testing.assert_close(found["e.png", "0000"], (1 - left)[None], **near)


def test_batch_with_and_without(latents):
    """Samples without a mask stand beside those with one; a sample alone is the same."""
    data = LatentData(shards=latents, holdout=0)
    samples = [n for n, name in enumerate(data.bucket_names) if name == "17x32x32"]
    batch = data.load(samples, samples)
    assert batch.masked_B.tolist().count(0) == 1 and batch.mask_BTHW.shape == batch.latents_BCTHW[:, 0].shape
    weight = FlowMatching(mask="focus", mask_rest=0.5).masks.weights(batch)
    assert (weight[batch.masked_B == 0] == 1).all() and weight.min() == 0.5
    for row, sample in enumerate(samples):
        alone = data.load([sample], [sample])
        if alone.mask_BTHW is not None:
            assert torch.equal(alone.mask_BTHW[0], batch.mask_BTHW[row])
    taken = batch.take([2, 0])
    assert torch.equal(taken.mask_BTHW, batch.mask_BTHW[[2, 0]]) and torch.equal(taken.masked_B, batch.masked_B[[2, 0]])


def test_masks_that_condition_too(videos, latents, tmp_path):
    """The same mask conditions (black is known) and weighs (white counts)."""
    encode(videos, tmp_path / "both", {"mask": 1.0})
    data = LatentData(shards=tmp_path / "both", holdout=0, mask_types={"mask": 1.0}, conditioning="channel_concat")
    weighing = masks_of(LatentData(shards=latents, holdout=0))
    for place, mask in masks_of(data).items():
        assert torch.equal(mask, weighing[place])
    batch = data.load([0], [0])
    known = batch.conditioning["concat_BCTHW"][0, :4].amin(dim=0)
    assert (batch.mask_BTHW[0][known == 1] < 0.02).all() and (known == 1).any(), "what is known does not count"


def test_counts_and_refusals(latents, capsys):
    """The index says which clips have a mask and which masks leave nothing; both are judged before a run starts."""
    data = LatentData(shards=latents, holdout=0)
    (count,) = data.mask_counts()
    assert (count.windows, count.masked, len(count.all_black), len(count.all_white)) == (6, 5, 1, 0)
    with pytest.raises(
        ValueError, match=rf"^loss\.mask=focus leaves no pixel of 1 clips \(first: {count.all_black[0]}"
    ):
        loss_masks.check([FlowMatching(mask="focus")], data)
    capsys.readouterr()
    loss_masks.check([FlowMatching(mask="focus", mask_rest=0.1)], data)
    assert capsys.readouterr().out == (
        "loss.mask=focus, the rest at 0.1: 5 of 6 clips have a mask; the others count whole\n"
    )
    loss_masks.check([FlowMatching(mask="ignore")], data)
    loss_masks.check([FlowMatching()], data)


def test_shards_without_masks(videos, latents, tmp_path):
    """Latents that were encoded without masks, or footage that has none, are one clear error each."""
    plain = tmp_path / "plain"
    encode(videos, plain, loss_mask=False)
    data = LatentData(shards=plain, holdout=0)
    assert data.load([0], [0]).mask_BTHW is None and data.mask_counts()[0].masked == 0
    with pytest.raises(
        ValueError, match=r"^loss\.mask=ignore: the latents in .*plain come without masks.*loss_mask=true"
    ):
        loss_masks.check([FlowMatching(mask="ignore")], data)
    sets = {"masked": {"shards": str(latents)}, "plain": {"shards": str(plain)}}
    both = MixedData(sets=sets, holdout=0)
    loss_masks.check([FlowMatching(mask="focus", mask_rest=0.1)], both)
    samples = [n for n, name in enumerate(both.bucket_names) if name == "17x32x32"]
    batch = both.load(samples, samples)
    half = len(samples) // 2
    assert batch.sets == ("masked",) * half + ("plain",) * half
    assert (batch.masked_B[half:] == 0).all() and batch.masked_B[:half].sum() == 4
    with pytest.raises(ValueError, match="leaves no pixel of 1 clips"):
        loss_masks.check([FlowMatching(mask="focus")], both)


def test_no_mask_at_all(footage, tmp_path):
    """loss_mask=true without a single mask is refused before anything is encoded."""
    source = Path(shutil.copytree(footage, tmp_path / "footage"))
    shutil.rmtree(source / "masks")
    shard(source, tmp_path / "videos")
    with pytest.raises(ValueError, match=r"^loss_mask=true: no clip in shards=.* has a mask; put masks/NAME\.mp4"):
        encode(tmp_path / "videos", tmp_path / "out", encode_pixels=shard_helpers.never)


def test_encoded_again(footage, videos, latents, tmp_path):
    """A changed mask, or masks that are asked for later, encode their own clips alone; the folder is a fresh one's."""
    later = tmp_path / "later"
    encode(videos, later, loss_mask=False)
    counting = shard_helpers.Counting(shard_helpers.encode_pixels)
    encode(videos, later, encode_pixels=counting, encode_texts=shard_helpers.never)
    assert len(counting.inputs) == 5, "all but the clip without a mask"
    names = sorted(path.name for path in latents.glob("*.*") if not path.name.startswith("report"))
    for name in names:
        assert (later / name).read_bytes() == (latents / name).read_bytes(), name
    source = Path(shutil.copytree(footage, tmp_path / "footage"))
    Image.fromarray(np.full((HEIGHT, WIDTH), 255, np.uint8)).save(source / "masks" / "b.png")
    shard(source, tmp_path / "videos")
    counting = shard_helpers.Counting(shard_helpers.encode_pixels)
    encode(tmp_path / "videos", later, encode_pixels=counting, encode_texts=shard_helpers.never)
    assert len(counting.inputs) == 1
    (count,) = LatentData(shards=later, holdout=0).mask_counts()
    assert (count.masked, len(count.all_black), len(count.all_white)) == (5, 1, 1)
    assert (masks_of(LatentData(shards=later, holdout=0))["b.mp4", "0000"] == 1).all()


def test_loss_weights(footage, tmp_path):
    """A column loss_weight of the table travels to the batches, encodes nothing again, and folders without one keep
    their bytes.
    """
    source = Path(shutil.copytree(footage, tmp_path / "footage"))
    shard(source, tmp_path / "videos")
    encode(tmp_path / "videos", tmp_path / "latents", loss_mask=False)
    index = tmp_path / "latents" / read_manifest(tmp_path / "latents", "latent")["files"][0]["name"]
    assert (
        b"loss_weight" not in index.read_bytes()
        and LatentData(shards=tmp_path / "latents").load([0], [0]).weight_B is None
    )
    (source / "metadata.csv").write_text("path,caption,loss_weight\na.mp4,clip a,0.25\nd.mp4,clip d,3\nb.mp4,clip b,\n")
    shard(source, tmp_path / "videos")
    encode(
        tmp_path / "videos", tmp_path / "latents", loss_mask=False,
        encode_pixels=shard_helpers.never, encode_texts=shard_helpers.never,
    )  # fmt: skip
    data = LatentData(shards=tmp_path / "latents", holdout=0)
    weights = {}
    for sample in range(len(data.train)):
        batch = data.load([sample], [sample])
        file, _ = source_of(data, batch.clips[0])
        weights[file] = 1.0 if batch.weight_B is None else batch.weight_B.item()
    assert weights == {"a.mp4": 0.25, "b.mp4": 1.0, "c.mp4": 1.0, "d.mp4": 3.0, "e.png": 1.0}
    samples = [n for n, name in enumerate(data.bucket_names) if name == "17x32x32"]
    assert sorted(data.load(samples, samples).weight_B.tolist()) == [0.25, 0.25, 1, 1, 3]
    (source / "metadata.csv").write_text("path,caption,loss_weight\na.mp4,clip a,0\n")
    with pytest.raises(ValueError, match=r"metadata\.csv line 2 .*loss_weight=0 must be above 0"):
        shard(source, tmp_path / "other")


def test_damaged_mask(latents, tmp_path):
    """A stored mask of another shape than its latents is named."""
    data = LatentData(shards=latents, holdout=0)
    tensors = data._tensors

    def cut(*args):
        found = tensors(*args)
        return {key: value[:1] if key == "loss_mask" else value for key, value in found.items()}

    data._tensors = cut
    with pytest.raises(ValueError, match=r": mask \(1, 4, 4\) \(expected \(5, 4, 4\)\); encode the shards again"):
        data.load([n for n, name in enumerate(data.bucket_names) if name == "17x32x32"], range(5))
