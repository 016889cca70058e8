"""Recognising encoders without loading them: a cache from the identity of files to the fingerprint of their weights.

The fingerprint of an encoder (weights.py) depends on its values alone, and needs all of them: 36 seconds and 11 GB for
umT5. The identity of its files takes milliseconds; it differs for the same values in another layout or dtype. The
fingerprint of an identity seen before is read from a manifest, or from a notes file beside the encoder's output.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from wantrain.models.formats.base import Base
from wantrain.models.formats.weights import tensor_files
from wantrain.util import distributed
from wantrain.util.files import write_json

NOTES = ".fingerprints.json"
#: Most entries of a notes file; the newest stay.
MOST_NOTES = 32
#: Files of up to so many bytes are read whole; of larger ones so many bytes at the end, where a .pth file has the
#: checksums of its parts.
WHOLE = 1 << 20
#: Number and bytes of the samples read from a large file, spread over it.
PIECES, PIECE = 64, 4096
#: Bytes read from the middle of each tensor of a safetensors file, so that a change of one layer is detected.
OF_TENSOR = 256
#: Longest header that a safetensors file may have.
LONGEST_HEADER = 100 << 20


def identity_of(files: Iterable[Path], *about: str) -> str:
    """Thirty-two hex digits for the contents of files, whatever their place, name and time.

    `about` is hashed too. Of a large file the size, the header and samples are read: a difference elsewhere is missed.
    ValueError for a file that cannot be read.
    """
    digests = sorted(_digest(file) for file in files)
    return hashlib.sha256(json.dumps([digests, *about]).encode()).hexdigest()[:32]


def identity(base: Base, part: str, dtype: torch.dtype | None = None) -> str:
    """The identity of a part of a base: an expert, `vae`, or `text_encoder` in `dtype` with its tokenizer. ValueError
    if it or one of its files is absent.
    """
    place = base.need(part)
    if part != "text_encoder":
        return identity_of(_files_of(place))
    tokenizer = (base.find("tokenizer") or place.parent / "tokenizer") / "tokenizer.json"
    return identity_of([*_files_of(place), *([tokenizer] if tokenizer.is_file() else [])], str(dtype))


def _files_of(part: Path) -> list[Path]:
    """The files of a part that loading reads: its tensors, and in a folder its config.json."""
    config = part / "config.json"
    return [*tensor_files(part), *([config] if config.is_file() else [])]


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            size = file.stat().st_size
            digest = hashlib.sha256(str(size).encode())
            for start, length in [(0, size)] if size <= WHOLE else _samples(opened, size, file.suffix):
                opened.seek(start)
                digest.update(opened.read(length))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return digest.hexdigest()


def _samples(file: BinaryIO, size: int, suffix: str) -> list[tuple[int, int]]:
    """(start, length) of each sample of a large file."""
    spread = [(size * piece // PIECES, PIECE) for piece in range(PIECES)]
    tensors = _tensors(file, size) if suffix == ".safetensors" else []
    return [*tensors, *spread, (size - WHOLE, WHOLE)]


def _tensors(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """A safetensors file's header, and the middle of each tensor."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size, LONGEST_HEADER):
        return []  # no safetensors file; loading it will raise the error
    header = json.loads(file.read(length))
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return [(0, 8 + length), *((8 + length + (begin + end - OF_TENSOR) // 2, OF_TENSOR) for begin, end in spans)]


class Fingerprints:
    """A cache of facts about parts of a model, by the identity of their files, kept in a folder: `of` reads or computes
    them, `write` saves them.
    """

    def __init__(self, folder: Path) -> None:
        self._notes = folder / NOTES
        self._stored: dict[str, Any] = {}
        if self._notes.is_file():
            self._stored = json.loads(self._notes.read_text(encoding="utf-8"))
        self._used: dict[str, Any] = {}

    def __contains__(self, key: tuple[str, str]) -> bool:
        """True if facts about (`about`, `identity`) are stored."""
        return self._key(*key) in self._stored

    def of(self, about: str, identity: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored facts for this identity, or else `compute()`. `about` names what else the facts depend on."""
        key = self._key(about, identity)
        self._used[key] = self._stored[key] if key in self._stored else compute()
        return dict(self._used[key])

    def write(self) -> None:
        """Save the facts that were used, with those stored before, of which the oldest are dropped; rank 0 only."""
        facts = {key: value for key, value in self._stored.items() if key not in self._used} | self._used
        if distributed.is_main() and not self._used.items() <= self._stored.items():
            write_json(self._notes, dict(list(facts.items())[-MOST_NOTES:]))

    @staticmethod
    def _key(about: str, identity: str) -> str:
        return f"{about}: {identity}"
