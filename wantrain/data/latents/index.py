"""The index of a latent folder: columns that say where each clip's latents and captions lie."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from wantrain.data.mmap import map_file, tensors_in
from wantrain.util.files import naming, sync_file

#: Bytes of a window's name (`ids`) and of an identity.
ID_LENGTH, IDENTITY_LENGTH = 24, 16


@dataclass(frozen=True)
class Index:
    """Three tables in columns: N clips (which training samples from), M windows (their latents), T distinct texts.

    Clip n has the windows windows[n] to windows[n+1], usually one; all have its bucket. It has the texts
    caption[captions[n]] to caption[captions[n+1]], and likewise its tags.

    bucket    (N,) number into the manifest's list of buckets
    source    (N,) number of the file that the clip was cut from
    group     (N,) group of files with near-duplicates (duplicates.py): the number of one of them, else the file's own
    weight    (N,) sampling weight; 1 unless the footage's annotation gives another
    loss_weight  (N,) weight in the loss; likewise
    windows   (N+1,) first window of each clip
    captions  (N+1,) first entry of each clip in `caption`, which holds numbers of texts
    tags      (N+1,) first entry of each clip in `tag`, which holds numbers into the manifest's list of tags
    shard, offset, size  (M,) a window's .safetensors member in its tar, a number into the manifest's `shards`
    ids       (M, 24) a window's name, zero padded
    identity  (M, 16) hash of everything that a window's latents depend on
    mask      (M,) what its mask shows (loss_masks.py); 0 without a stored one
    text_shard, text_offset, text_size, text_identity  (T,) the same for each text; its tar is in `text_shards`
    """

    bucket: NDArray[np.int32]
    source: NDArray[np.uint64]
    group: NDArray[np.uint64]
    weight: NDArray[np.float32]
    loss_weight: NDArray[np.float32]
    windows: NDArray[np.int64]
    captions: NDArray[np.int64]
    caption: NDArray[np.int32]
    tags: NDArray[np.int64]
    tag: NDArray[np.int32]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    ids: NDArray[np.uint8]
    identity: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    text_shard: NDArray[np.int32]
    text_offset: NDArray[np.int64]
    text_size: NDArray[np.int64]
    text_identity: NDArray[np.uint8]

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.bucket)

    def name(self, window: int) -> str:
        """The name of a window."""
        return self.ids[window].tobytes().rstrip(b"\0").decode()

    def text(self, identity: str) -> int:
        """The number of the text with this identity."""
        (number,) = np.flatnonzero((self.text_identity == pack_identities([identity])).all(1)).tolist()
        return int(number)

    def window(self, name: str) -> int | None:
        """The number of the window with this name, which `name` gave; None if there is none."""
        packed = np.frombuffer(name.encode().ljust(ID_LENGTH, b"\0"), dtype=np.uint8)
        if len(packed) != ID_LENGTH:
            return None
        found = np.flatnonzero((self.ids == packed).all(1)).tolist()
        return found[0] if found else None

    def clip_of(self, window: int) -> int:
        """The number of the clip that a window belongs to."""
        return int(np.searchsorted(self.windows, window, side="right")) - 1

    def windows_of(self, clip: int) -> range:
        """The numbers of a clip's windows."""
        return range(int(self.windows[clip]), int(self.windows[clip + 1]))

    def texts_of(self, clip: int) -> list[int]:
        """The numbers of a clip's texts."""
        return self.caption[self.captions[clip] : self.captions[clip + 1]].tolist()  # type: ignore[no-any-return]

    def tags_of(self, clip: int) -> list[int]:
        """The numbers of a clip's tags."""
        return self.tag[self.tags[clip] : self.tags[clip + 1]].tolist()  # type: ignore[no-any-return]

    def write(self, path: Path) -> None:
        """Write the index under a temporary name, then rename it."""
        partial = path.with_name(f".{path.name}.tmp")
        unused = {"loss_weight": 1, "mask": 0}  # left out: older versions wrote and read an index without them
        columns = {
            name: column for name, column in vars(self).items() if name not in unused or (column != unused[name]).any()
        }
        with naming(path):
            save_file({name: np.ascontiguousarray(column) for name, column in columns.items()}, partial)
        partial.chmod(0o644)  # safetensors creates files that other users of a shared disk cannot read
        sync_file(partial)
        partial.replace(path)

    @staticmethod
    def read(path: Path) -> Index:
        """Map the index from its file: only the columns that are used are read."""
        columns: dict[str, Any] = {name: column.numpy() for name, column in tensors_in(map_file(path)).items()}
        columns.setdefault("loss_weight", np.ones(len(columns["bucket"]), dtype=np.float32))
        columns.setdefault("mask", np.zeros(len(columns["shard"]), dtype=np.uint8))
        return Index(**columns)


def captions_by_key(folder: Path, manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """The captions of every window of a latent folder, by its key in the tars."""
    index, captions = Index.read(folder / manifest["files"][0]["name"]), list[str]()
    for shard in manifest["text_shards"]:  # in the index's order
        with tarfile.open(folder / shard["name"], "r:") as tar:
            opened = [tar.extractfile(member) for member in tar if member.name.endswith(".json")]
            captions += [json.loads(file.read())["caption"] for file in opened if file is not None]
    return {
        index.name(window): [captions[text] for text in index.texts_of(clip)]
        for clip in range(len(index))
        for window in index.windows_of(clip)
    }


def pack_ids(names: list[str]) -> NDArray[np.uint8]:
    """Names as rows of ID_LENGTH bytes."""
    assert all(len(name.encode()) <= ID_LENGTH for name in names)
    return _rows(b"".join(name.encode().ljust(ID_LENGTH, b"\0") for name in names), ID_LENGTH)


def pack_identities(identities: list[str]) -> NDArray[np.uint8]:
    """Identities (32 hex digits) as rows of bytes."""
    return _rows(bytes.fromhex("".join(identities)), IDENTITY_LENGTH)


def _rows(content: bytes, length: int) -> NDArray[np.uint8]:
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, length)
