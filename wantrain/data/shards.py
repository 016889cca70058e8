"""Shards on disk: WebDataset tars of videos or of latents, each folder with a manifest that is written last.

A folder without manifest.json is not finished. Tars are written beside their name and renamed, hold no pickle, and
have the same bytes for the same input. Readers check a shard's hash before they use it, because a tar that was cut
short reads as a shorter epoch without an error.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from webdataset import tariterators

from wantrain import world
from wantrain.data.footage import Reject
from wantrain.world import file_hash

SCHEMA = 1
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
INDEX = "index.safetensors"
EMPTY_TEXT = "empty_text.safetensors"
MADE_BY = {"video": "shard.py", "latent": "encode.py"}
ID_LENGTH = 24


class ShardWriter:
    """Writes samples into numbered tars of about `shard_bytes`; `shards` describes the finished ones.

    `write` returns where a member's bytes lie: (shard number, offset, size).
    """

    def __init__(self, folder: Path, kind: str, shard_bytes: int) -> None:
        self.folder, self.kind, self.shard_bytes = folder, kind, shard_bytes
        self.shards: list[dict[str, Any]] = []
        self.tar: tarfile.TarFile | None = None
        self.samples = 0
        for leftover in folder.glob(f".{kind}-*.tar.tmp"):
            leftover.unlink()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self.tar is not None:
            self.tar.close()
            self._beside.unlink()

    @property
    def name(self) -> str:
        return f"{self.kind}-{len(self.shards):06d}.tar"

    @property
    def _beside(self) -> Path:
        return self.folder / f".{self.name}.tmp"

    def write(self, key: str, members: Mapping[str, bytes]) -> dict[str, tuple[int, int, int]]:
        """Add one sample: its members by extension."""
        if self.tar is None:
            # TarInfo leaves time and owner at zero: equal samples give equal bytes.
            self.tar = tarfile.open(self._beside, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        places = {}
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(content)
            self.tar.addfile(info, io.BytesIO(content))
            # The content ends at the last whole block; it began right after the header.
            padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            places[extension] = (len(self.shards), self.tar.offset - padded, len(content))
        self.samples += 1
        if self.tar.offset >= self.shard_bytes:
            self._finish()
        return places

    def _finish(self) -> None:
        if self.tar is None:
            return
        self.tar.close()
        world.sync_file(self._beside)
        final = self.folder / self.name
        self._beside.replace(final)
        row = {**describe_file(final), "samples": self.samples}
        self.tar, self.samples = None, 0
        self.shards.append(row)


@dataclass(frozen=True)
class VideoSample:
    """One file of a video shard: its bytes and what shard.py found out about it."""

    key: str
    extension: str
    content: bytes
    about: dict[str, Any]


def to_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object as bytes, the same for the same value."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def write_rejects(out: Path, rejects: list[Reject], total: int, limit: float, unit: str) -> None:
    """Write rejects.jsonl, say the first; ValueError if the bad ones' share of `total` is above `limit`, or all go."""
    rows = [{"name": reject.name, "reason": reject.reason} for reject in rejects]
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    world.write_atomically(out / REJECTS, text)
    for reject in rejects[:5]:
        world.say(f"rejected {reject.name}: {reject.reason}")
    bad = [reject for reject in rejects if reject.bad]
    if len(bad) > limit * total:
        raise ValueError(
            f"{len(bad)} of {total} {unit}s are bad, more than rejects.limit={limit:g} allows; "
            f"first: {bad[0].name}: {bad[0].reason}. All are in {out / REJECTS}; "
            "mend or remove them, or raise rejects.limit"
        )
    if len(rejects) == total:
        raise ValueError(f"all {total} {unit}s are rejected; the reasons are in {out / REJECTS}")


def finished(out: Path, kind: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of `out` if this very work is done already; None after claiming the folder for it.

    ValueError if the folder holds something else, or the same kind of shards made with other settings.
    """
    if not (out / MANIFEST).is_file():
        world.claim_folder(out, mark=REJECTS, key="out")
        world.write_atomically(out / REJECTS, "")  # from here on the folder is ours, also after a kill
        for stale in out.glob(f"{kind}-*.tar"):
            stale.unlink()
        return None
    if _load_manifest(out).get("kind") != kind:
        raise ValueError(f"out={out} holds shards of another kind; give another out=")
    manifest = read_manifest(out, kind)
    differing = [key for key in settings if manifest["settings"].get(key) != settings[key]]
    if differing:
        changes = "; ".join(_change(key, manifest["settings"].get(key), settings[key]) for key in differing)
        raise ValueError(f"out={out} holds {kind} shards made otherwise ({changes}); give another out=, or remove it")
    world.say(f"{out} is finished already: {manifest['clips']} clips; nothing to do")
    return manifest


def _change(key: str, before: Any, now: Any) -> str:
    """One difference between settings, for people: hashes are not shown."""
    if key in {"footage", "shards"}:
        return "footage: other files, bytes or captions" if key == "footage" else "shards: other video shards"
    return f"{key}: {before} -> {now}"


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a finished folder of `kind` ("video" or "latent"); ValueError says which verb to run."""
    verb = MADE_BY[kind]
    if not (folder / MANIFEST).is_file():
        what = "is not finished" if (folder / REJECTS).exists() else "holds no shards"
        raise ValueError(f"{folder} {what} (no {MANIFEST}); run python {verb} out={folder} ... first")
    manifest = _load_manifest(folder)
    if manifest.get("schema") != SCHEMA:
        raise ValueError(f"{folder} has schema {manifest.get('schema')}, this version reads {SCHEMA}; run {verb} again")
    if manifest["kind"] != kind:
        raise ValueError(f"{folder} holds {manifest['kind']} shards, but {kind} shards are needed: run python {verb}")
    return manifest


def _load_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); make the shards again") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder / MANIFEST} is no JSON object; make the shards again")
    return manifest


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says about a file beside it: name, bytes, sha256."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_hash(path)}


def check_shards(folder: Path, manifest: Mapping[str, Any], *, hashes: bool = True) -> None:
    """Raise ValueError if a file is absent or not what was written: by size, and by hash too if `hashes`."""
    for shard in [*manifest["shards"], *manifest.get("files", [])]:
        path = folder / shard["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"] or (hashes and file_hash(path) != shard["sha256"]):
            state = "is missing" if size is None else f"is damaged ({size} bytes, written were {shard['bytes']})"
            raise ValueError(f"{path} {state}; restore it, or make the shards again with {MADE_BY[manifest['kind']]}")


def read_video_shards(folder: Path, manifest: Mapping[str, Any]) -> Iterator[VideoSample]:
    """Every sample of a video folder, in order; each shard's hash is checked before it is read."""
    for shard in manifest["shards"]:
        check_shards(folder, {"kind": "video", "shards": [shard]})
        with (folder / shard["name"]).open("rb") as file:
            # webdataset's own iteration over a tar, and nothing above it: its default decoders run code from .pyd,
            # .pickle and .pth members, its opener runs paths that begin with "pipe:", its splitter looks at ranks.
            members = tariterators.tar_file_expander([{"url": shard["name"], "stream": file}])
            for sample in tariterators.group_by_keys(members):
                (extension,) = [key for key in sample if not key.startswith("__") and key != "json"]
                yield VideoSample(sample["__key__"], extension, sample[extension], json.loads(sample["json"]))


@dataclass(frozen=True)
class Index:
    """Where every latent lies, in columns of equal length (about 60 bytes a clip).

    shard, offset, size  the .safetensors member's bytes inside its tar
    bucket               number into the manifest's list of buckets
    source               the file a clip was cut from, as a number
    ids                  (N, 24) bytes, zero padded
    """

    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    bucket: NDArray[np.int32]
    source: NDArray[np.uint64]
    ids: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, sample: int) -> str:
        """The id of one sample."""
        return self.ids[sample].tobytes().rstrip(b"\0").decode()

    def write(self, folder: Path) -> None:
        """Write the index beside its name, then rename it."""
        beside = folder / f".{INDEX}.tmp"
        save_file(vars(self), beside)
        world.sync_file(beside)
        beside.replace(folder / INDEX)

    @staticmethod
    def read(folder: Path) -> Index:
        """The index of a finished folder of latent shards."""
        return Index(**load_file(folder / INDEX))


def pack_ids(names: list[str]) -> NDArray[np.uint8]:
    """Names as rows of ID_LENGTH bytes."""
    assert all(len(name.encode()) <= ID_LENGTH for name in names)
    rows = b"".join(name.encode().ljust(ID_LENGTH, b"\0") for name in names)
    return np.frombuffer(rows, dtype=np.uint8).reshape(-1, ID_LENGTH)
