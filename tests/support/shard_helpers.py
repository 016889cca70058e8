"""Make small video and latent shards with simple encoders: a latent is a pixel, an embedding is a caption's letters."""

import hashlib
import tarfile
from dataclasses import fields

import torch

from wantrain import geometry
from wantrain.data import (
    ClipOptions,
    ConditioningInputs,
    DecodeOptions,
    EncodeOptions,
    Encoders,
    ShardOptions,
    encode_shards,
    find_footage,
    read_manifest,
    write_video_shards,
)
from wantrain.data.footage.pixels import read_clips
from wantrain.data.latents.index import Index

SIZES = geometry.Buckets((4096,), (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16), 16)


def encode_pixels(pixels_BCTHW):
    """One pixel of every 4x8x8 block."""
    return pixels_BCTHW[:, :, ::4, ::8, ::8]


def encode_texts(texts):
    """One row per letter, and one for the end: the letter's number in 3 columns."""
    return [torch.tensor([[ord(letter) % 97] * 3 for letter in text] + [[-1] * 3]).float() for text in texts]


def one_row(texts):
    """A single row per text."""
    return [torch.ones(1, 3) * len(text) for text in texts]


def never(_):
    raise AssertionError("nothing is to be encoded")


class Counting:
    """An encoder that records its inputs."""

    def __init__(self, encode):
        self.encode, self.inputs = encode, []

    def __call__(self, inputs):
        self.inputs.extend(inputs)
        return self.encode(inputs)


def _record(record, settings):
    """Make an options record of those settings that are its fields, and remove them from the settings."""
    return record(**{field.name: settings.pop(field.name) for field in fields(record) if field.name in settings})


def shard(source, out, *, found=None, **settings):
    """Run `write_video_shards` with the fields of all its option records as keywords."""
    settings = {"model": "tiny", "num_frames": 17, "fps": 16, "shard_bytes": 1 << 20, **settings}
    clips, decode = _record(ClipOptions, settings), _record(DecodeOptions, settings)
    footage, rejects, *tally = find_footage(source) if found is None else found
    return write_video_shards(footage, rejects, out, ShardOptions(clips=clips, decode=decode, **settings), *tally)


def encode(shards, out, **settings):
    """Run `encode_shards` with the fields of all its option records as keywords."""
    settings = {
        "encode_pixels": encode_pixels,
        "encode_texts": encode_texts,
        "model": "tiny",
        "vae_fingerprint": "vae-1",
        "text_fingerprint": "text-1",
        "tokenizer_fingerprint": "words-1",
        "shard_bytes": 1 << 20,
        "shard_clips": 4,
        **settings,
    }
    inputs = {
        "sizes": settings.pop("sizes", SIZES),
        "inputs": settings.pop("inputs", None) or ConditioningInputs({}, "none"),
        "read": settings.pop("read", read_clips),
    }
    encoders, decode = _record(Encoders, settings), _record(DecodeOptions, settings)
    return encode_shards(shards, out, encoders, options=EncodeOptions(decode=decode, **settings), **inputs)


def read_index(folder):
    return Index.read(folder / read_manifest(folder, "latent")["files"][0]["name"])


def members(folder, kind="latent"):
    """Every member of every tar of a kind, by name."""
    contents = {}
    for path in sorted(folder.glob(f"{kind}-*.tar")):
        with tarfile.open(path) as tar:
            contents.update({member.name: tar.extractfile(member).read() for member in tar.getmembers()})
    return contents


def contents(folder):
    """The hashes of all files in a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
