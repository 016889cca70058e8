"""Knowing encoders again without loading them.

The fingerprint of an encoder (models/weights.py) depends on its values alone, and needs all of them: 36 seconds and
11 GB for umT5. The identity of its files is found in milliseconds; it differs for the same values in another layout or
dtype. Where an identity has been seen before, its fingerprint is known: from a manifest, or from notes beside what the
encoder made.
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
#: Notes of one folder, at most: the newest stay.
MOST_NOTES = 32
#: A file up to so many bytes is read whole; so is so much of the end of a larger one, where a .pth has the checksums of
#: all its parts.
WHOLE = 1 << 20
#: Of a large file: so many pieces, spread over it, of so many bytes each.
PIECES, PIECE = 64, 4096
#: Bytes read from the middle of each tensor of a safetensors file: a change to one layer is seen.
OF_TENSOR = 256
#: A longer header than this has no safetensors file.
LONGEST_HEADER = 100 << 20


def identity_of(files: Iterable[Path], *about: str) -> str:
    """Thirty-two hex digits for what files hold, wherever they lie, whatever they are called and however old they are.

    `about` is what else counts. Of a large file the size, the header and samples are read: one that differs nowhere
    else is taken for the same. ValueError for a file that cannot be read.
    """
    told = sorted(_digest(file) for file in files)
    return hashlib.sha256(json.dumps([told, *about]).encode()).hexdigest()[:32]


def identity(base: Base, part: str, dtype: torch.dtype) -> str:
    """The identity of a base's encoder: `vae`, or `text_encoder` in `dtype` with its tokenizer. ValueError for one that
    is not there, or of which files are missing.
    """
    place = base.need(part)
    if part == "vae":
        return identity_of(_files_of(place))
    tokenizer = (base.find("tokenizer") or place.parent / "tokenizer") / "tokenizer.json"
    return identity_of([*_files_of(place), *([tokenizer] if tokenizer.is_file() else [])], str(dtype))


def _files_of(part: Path) -> list[Path]:
    """What loading reads of a part: its tensors, and of a folder its config.json."""
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
    """Where a large file is looked at: (start, length) of each piece."""
    spread = [(size * piece // PIECES, PIECE) for piece in range(PIECES)]
    tensors = _tensors(file, size) if suffix == ".safetensors" else []
    return [*tensors, *spread, (size - WHOLE, WHOLE)]


def _tensors(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """A safetensors file's header, and the middle of each tensor."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size, LONGEST_HEADER):
        return []  # no safetensors file after all; whoever loads it will say so
    header = json.loads(file.read(length))
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return [(0, 8 + length), *((8 + length + (begin + end - OF_TENSOR) // 2, OF_TENSOR) for begin, end in spans)]


class Fingerprints:
    """Facts about parts of a model, by the identity of their files, as noted in a folder: `of` finds them or looks
    again, `write` notes what it saw.
    """

    def __init__(self, folder: Path) -> None:
        self._notes = folder / NOTES
        self._known: dict[str, Any] = {}
        if self._notes.is_file():
            self._known = json.loads(self._notes.read_text(encoding="utf-8"))
        self._seen: dict[str, Any] = {}

    def __contains__(self, key: tuple[str, str]) -> bool:
        """True if facts about (`about`, `identity`) are noted."""
        return self._key(*key) in self._known

    def of(self, about: str, identity: str, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`look()`, or what it gave when the files had this identity before. `about` says what else the facts depend
        on.
        """
        key = self._key(about, identity)
        self._seen[key] = self._known[key] if key in self._known else look()
        return dict(self._seen[key])

    def write(self) -> None:
        """Note what was asked for beside what is noted already, of which the oldest goes; rank 0 only."""
        told = {key: value for key, value in self._known.items() if key not in self._seen} | self._seen
        if distributed.is_main() and not self._seen.items() <= self._known.items():
            write_json(self._notes, dict(list(told.items())[-MOST_NOTES:]))

    @staticmethod
    def _key(about: str, identity: str) -> str:
        return f"{about}: {identity}"
