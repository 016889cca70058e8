"""Content of latent folders: the encoders' outputs for the right pixels and captions, and nothing else."""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load
from shard_helpers import SIZES, contents, encode, encode_pixels, encode_texts, members, read_index

from wantrain.data import read_manifest
from wantrain.data.footage.pixels import prepare_pixels, read_sample
from wantrain.data.footage.video_shards import read_video_shards
from wantrain.data.latents import encoding
from wantrain.data.shards import describe_file


def rewrite(folder, change):
    """Video shards with each sample's `about` changed, as another shard.py might have written it."""
    manifest = read_manifest(folder, "video")
    for number, row in enumerate(manifest["shards"]):
        path = folder / row["name"]
        with tarfile.open(path) as tar:
            found = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
        with tarfile.open(path, "w") as tar:
            for member, content in found:
                if member.name.endswith(".json"):
                    content = json.dumps(change(json.loads(content))).encode()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        manifest["shards"][number] = {**row, **describe_file(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_content(videos, latents):
    found, texts, wanted = members(latents), members(latents, "text"), set()
    said = {
        json.loads(about)["caption"]: name.removesuffix(".json")
        for name, about in texts.items()
        if name.endswith(".json")
    }
    for sample in read_video_shards(videos, read_manifest(videos, "video")):
        for number, frames in enumerate(read_sample(sample)):
            key = f"{sample.key}-{number:04d}"
            wanted |= {f"{key}.safetensors", f"{key}.json"}
            size = SIZES.choose(len(frames), sample.about["height"], sample.about["width"])
            pixels, cropped = prepare_pixels(frames, size)
            tensors = load(found[f"{key}.safetensors"])
            assert set(tensors) == {"latents"}
            torch.testing.assert_close(tensors["latents"], encode_pixels(pixels[None])[0].bfloat16(), rtol=0, atol=0)
            about = json.loads(found[f"{key}.json"])
            assert about["bucket"] == f"{len(frames)}x{size[0]}x{size[1]}"
            assert about["cropped"] == pytest.approx(cropped, abs=1e-4)
            assert about["source"] == sample.about["source"]
            window = sample.about["windows"][number]
            assert {key: about[key] for key in window} == window
        text = load(texts[f"{said[sample.about['caption']]}.safetensors"])
        assert set(text) == {"text"}
        torch.testing.assert_close(text["text"], encode_texts([sample.about["caption"]])[0].bfloat16(), rtol=0, atol=0)
    assert set(found) == wanted
    captions = {sample.about["caption"] for sample in read_video_shards(videos, read_manifest(videos, "video"))}
    assert set(said) == captions | {""} and len(texts) == 2 * len(said)


def test_batches_by_bucket(videos, tmp_path):
    shapes = []

    def watched(pixels):
        shapes.append(tuple(pixels.shape))
        return encode_pixels(pixels)

    clips = read_manifest(videos, "video")["clips"]
    encode(videos, tmp_path / "together", encode_pixels=watched, shard_clips=64)
    assert any(shape[0] > 1 for shape in shapes) and sum(shape[0] for shape in shapes) == clips
    shapes.clear()
    encode(videos, tmp_path / "alone", encode_pixels=watched, shard_clips=64, batch_pixels=1)
    assert all(shape[0] == 1 for shape in shapes)
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_manifest_and_index(videos, latents):
    manifest, index, found = read_manifest(latents, "latent"), read_index(latents), members(latents)
    texts = members(latents, "text")
    assert manifest["clips"] == len(index) == len(found) // 2 == read_manifest(videos, "video")["clips"]
    assert manifest["windows"] == len(index) and manifest["texts"] == len(texts) // 2
    assert len(manifest["shards"]) > 2 and len(manifest["text_shards"]) > 1
    assert manifest["settings"]["shards"] == hashlib.sha256((videos / "manifest.json").read_bytes()).hexdigest()
    assert (manifest["vae_fingerprint"], manifest["text_encoder_fingerprint"]) == ("vae-1", "text-1")
    assert (manifest["latent_channels"], manifest["text_dim"]) == (3, 3)
    assert (manifest["temporal_stride"], manifest["spatial_stride"]) == (4, 8)
    files = [*manifest["shards"], *manifest["text_shards"], *manifest["files"]]
    assert sorted([row["name"] for row in files] + ["manifest.json", "rejects.jsonl"]) == sorted(contents(latents))
    for row in files:
        content = (latents / row["name"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    captions = {
        sample.key: sample.about["caption"] for sample in read_video_shards(videos, read_manifest(videos, "video"))
    }
    for clip in range(len(index)):
        (window,), (text,) = index.windows_of(clip), index.texts_of(clip)
        name, offset = index.name(window), int(index.offset[window])
        tar = (latents / manifest["shards"][index.shard[window]]["name"]).read_bytes()
        assert tar[offset : offset + int(index.size[window])] == found[f"{name}.safetensors"]
        assert f"{int(index.source[clip]):016x}" == name[:16]
        about = json.loads(found[f"{name}.json"])
        assert manifest["buckets"][index.bucket[clip]] == about["bucket"]
        assert index.identity[window].tobytes().hex() == about["identity"]
        tar = (latents / manifest["text_shards"][index.text_shard[text]]["name"]).read_bytes()
        offset = int(index.text_offset[text])
        stored = load(tar[offset : offset + int(index.text_size[text])])["text"]
        assert torch.equal(stored, encode_texts([captions[name[:16]]])[0].bfloat16())
    assert index.weight.tolist() == [1.0] * len(index)


def test_read_by_webdataset(latents):
    for kind, key in (("latent", "latents"), ("text", "text")):
        names = [str(path) for path in sorted(latents.glob(f"{kind}-*.tar"))]
        theirs = list(webdataset.WebDataset(names, shardshuffle=False))
        assert len(theirs) == len(members(latents, kind)) // 2
        assert all(set(load(sample["safetensors"])) == {key} and json.loads(sample["json"]) for sample in theirs)


def test_same_bytes_any_workers(videos, latents, tmp_path):
    for workers in (1, 3):
        encode(videos, tmp_path / str(workers), workers=workers)
        assert contents(tmp_path / str(workers)) == contents(latents)


def test_near_duplicates_one_group(videos, latents, tmp_path):
    index = read_index(latents)
    assert (index.group == index.source).all()
    shards = Path(shutil.copytree(videos, tmp_path / "videos"))
    manifest = read_manifest(shards, "video")
    one, other, *_ = sorted({f"{source:016x}" for source in index.source})
    (shards / "manifest.json").write_text(json.dumps({**manifest, "alike": [[other, one]]}))
    encode(shards, tmp_path / "alike", encode_pixels=encode_pixels)
    index = read_index(tmp_path / "alike")
    assert (index.group == np.where(index.source == int(other, 16), int(one, 16), index.source)).all()


def test_captions_encoded_once(videos, tmp_path):
    calls = []

    def counting(texts):
        calls.append(texts)
        return encode_texts(texts)

    encode(videos, tmp_path / "out", encode_texts=counting, shard_clips=64)
    captions = {sample.about["caption"] for sample in read_video_shards(videos, read_manifest(videos, "video"))}
    assert sorted(text for texts in calls for text in texts) == sorted({*captions, ""})
    assert len(calls) == -(-(len(captions) + 1) // encoding.TEXTS_TOGETHER)


def test_captions_of_similar_lengths_together(videos, tmp_path):
    """Batches go by the tokens that captions have, not by their letters."""
    calls = []

    def counting(texts):
        calls.append(texts)
        return encode_texts(texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "TEXTS_TOGETHER", 2)
        encode(videos, tmp_path / "out", encode_texts=counting, count_tokens=lambda text: -len(text), shard_clips=64)
    lengths = [len(text) for texts in calls for text in texts]
    assert len(set(lengths)) > 2 and lengths == sorted(lengths, reverse=True)
    assert all(len(texts) <= 2 for texts in calls)


def test_several_captions_and_windows(videos, tmp_path):
    shards = Path(shutil.copytree(videos, tmp_path / "videos"))

    def change(about):
        about["captions"] = [about["caption"], f"again: {about['caption']}", "what all share"]
        about["weight"] = 2.5 if about["source"] == "clip-0000.mp4" else 1
        if len(about["windows"]) == 1 and about["windows"][0]["num_frames"] == 17:
            about["windows"] = [{"start": start, "num_frames": 9, "clip": 0} for start in (0.0, 0.25, 0.5)]
        return about

    rewrite(shards, change)
    manifest, folder = encode(shards, tmp_path / "out", shard_clips=64), tmp_path / "out"
    index, found = read_index(folder), members(folder)
    grouped = [clip for clip in range(len(index)) if len(index.windows_of(clip)) == 3]
    assert grouped and manifest["windows"] == manifest["clips"] + 2 * len(grouped)
    for clip in range(len(index)):
        names = [index.name(window) for window in index.windows_of(clip)]
        abouts = [json.loads(found[f"{name}.json"]) for name in names]
        assert {about["bucket"] for about in abouts} == {manifest["buckets"][index.bucket[clip]]}
        assert {name[:16] for name in names} == {f"{int(index.source[clip]):016x}"}
        assert len(index.texts_of(clip)) == 3
        assert index.weight[clip] == (2.5 if abouts[0]["source"] == "clip-0000.mp4" else 1)
    shared = [index.texts_of(clip)[2] for clip in range(len(index))]
    assert len(set(shared)) == 1, "a caption that many clips have is one text"
