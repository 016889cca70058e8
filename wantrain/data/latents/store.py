"""A folder of latents: what earlier runs left in it, what this run adds, and the index and manifest over both.

Each work unit (work_units.py) becomes one tar, named by the hash of its content, and a hidden record that says where
each row lies and which rows were rejected. When all records are written, rank 0 makes index and manifest from them and
removes files that nothing refers to. Until then the folder keeps its earlier state, so a run may be killed at any
time; the next run finds all finished work units by name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wantrain.data.latents import loss_masks
from wantrain.data.latents.index import Index, pack_identities, pack_ids
from wantrain.data.latents.work_units import Row, WorkUnit, tar_name
from wantrain.data.shards import (
    LATENT_SCHEMA,
    MANIFEST,
    REJECTS,
    TarWriter,
    describe_file,
    disk_errors,
    file_hash,
    files_of,
    load_manifest,
    to_json,
)
from wantrain.util.files import claim_folder, write_atomically, write_json

#: Manifest fields, by the kind of work unit: the list of tars, and the width of their tensors.
_TARS = {"latent": "shards", "text": "text_shards"}
_WIDTHS = {"latent": "latent_channels", "text": "text_dim"}
#: Seconds after which a file written by another machine must be visible here; NFS refreshes after at most 60.
TIMEOUT = 90.0


@dataclass(frozen=True)
class Record:
    """Result of a work unit.

    tar      the manifest's row about its tar; None if every row was rejected
    places   (offset, size) of each row's .safetensors member, by identity
    rejects  the reason of each rejected row, by identity
    width    latent channels, or the texts' dimension; 0 if nothing was made
    masks    what the index says of the mask of each row that has one (loss_masks.py), by identity
    """

    tar: dict[str, Any] | None
    places: dict[str, tuple[int, int]]
    rejects: dict[str, str]
    width: int
    masks: dict[str, int] = field(default_factory=dict)


@dataclass
class _Earlier:
    """What a finished run left: its manifest, and by identity (tar, offset, size) of each row, and masks."""

    manifest: dict[str, Any] = field(default_factory=dict)
    places: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    rejects: dict[str, str] = field(default_factory=dict)
    tars: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: frozenset[int] = frozenset()
    masks: dict[str, int] = field(default_factory=dict)


class LatentFolder:
    """The latent folder `out` while a run fills it. `retry` ignores the rejects of earlier runs.

    ValueError if the folder holds something else, or latents of another schema.
    """

    def __init__(self, out: Path, *, retry: bool = False) -> None:
        self.out = out
        self.earlier = _Earlier()
        if (out / MANIFEST).is_file():
            self.earlier = _read_earlier(out)
            if retry:
                self.earlier.rejects.clear()
        else:
            claim_folder(out, sentinel=REJECTS, key="out")
            (out / REJECTS).touch()  # marks the folder as ours, even after a kill
        self._whole: dict[str, bool] = {}

    def is_finished(self, settings: Mapping[str, Any]) -> bool:
        """True if the folder was made with these settings, and all its files exist in full size."""
        manifest = self.earlier.manifest
        return (
            bool(manifest)
            and manifest["settings"] == settings
            and len(_intact(self.out, manifest)) == len(files_of(manifest))
        )

    def check_same_footage(self, sources: set[int]) -> None:
        """Raise ValueError if the folder's clips come from entirely different files: then `out` is a mistake."""
        if self.earlier.sources and sources and not self.earlier.sources & sources:
            raise ValueError(
                f"out={self.out} holds latents of other footage, without a file in common; give another out="
            )

    def find(self, unit: WorkUnit) -> Record | None:
        """The record of a work unit that this, a killed or an earlier run has done; None if it is not done."""
        path = self._record(unit)
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            record = Record(**{**stored, "places": {key: tuple(at) for key, at in stored["places"].items()}})
            if record.tar is None or _has_size(self.out, record.tar):
                return record
        return self._find_earlier(unit)

    def gather(self, units: Sequence[WorkUnit]) -> list[tuple[WorkUnit, Record]]:
        """All work units with their records. ValueError if one has not appeared after `TIMEOUT` seconds."""
        records, deadline = list[tuple[WorkUnit, Record]](), time.monotonic() + TIMEOUT
        for unit in units:
            while (record := self.find(unit)) is None:
                if time.monotonic() > deadline:
                    raise ValueError(f"{self.out}: {unit.name} has disappeared; start the same command again")
                time.sleep(0.2)
            records.append((unit, record))
        return records

    def _find_earlier(self, unit: WorkUnit) -> Record | None:
        rejects = {row.identity: reason for row in unit.rows if (reason := self.earlier.rejects.get(row.identity))}
        rows = [row for row in unit.rows if row.identity not in rejects]
        name = tar_name(unit.kind, rows)
        if rows and name not in self.earlier.tars:
            return None
        places = {row.identity: self.earlier.places[row.identity][1:] for row in rows}
        masks = {row.identity: flag for row in rows if (flag := self.earlier.masks.get(row.identity))}
        return Record(self.earlier.tars.get(name), places, rejects, self.width(unit.kind) if rows else 0, masks)

    def forget_rejects(self, unit: WorkUnit) -> None:
        """Remove the record of a killed run's work unit that has rejects, so that it is made again."""
        record = self.find(unit)
        if record is not None and record.rejects:
            self._record(unit).unlink(missing_ok=True)

    def width(self, kind: str) -> int:
        """Channels of the latents (or the dimension of the texts) that an earlier run left; 0 without one."""
        return int(self.earlier.manifest.get(_WIDTHS[kind], 0))

    def rejected(self, row: Row) -> str | None:
        """The reason if an earlier run rejected a row, else None."""
        return self.earlier.rejects.get(row.identity)

    def stored(self, row: Row) -> Callable[[], bytes] | None:
        """A function that reads a row's .safetensors member from an earlier tar; None if it is absent or damaged."""
        place = self.earlier.places.get(row.identity)
        if place is None or not self._is_whole(place[0]):
            return None
        name, offset, size = place

        def read() -> bytes:
            with (self.out / name).open("rb") as file:
                file.seek(offset)
                return file.read(size)

        return read

    def read(self, row: Row) -> bytes:
        """A row's .safetensors member from an earlier tar, which must hold it."""
        stored = self.stored(row)
        assert stored is not None, "a row that is not missing is stored"
        return stored()

    def _is_whole(self, name: str) -> bool:
        """True if an earlier tar still has its hash; each tar is hashed once."""
        if name not in self._whole:
            tar = self.earlier.tars.get(name)
            self._whole[name] = tar is not None and file_hash(self.out / name) == tar["sha256"]
        return self._whole[name]

    def writer(self, unit: WorkUnit) -> UnitWriter:
        """A writer for a work unit, to be used in a `with`."""
        return UnitWriter(self.out, unit, self._record(unit), self.width(unit.kind))

    def _record(self, unit: WorkUnit) -> Path:
        return self.out / f".{unit.name}.json"

    def finish(self, manifest: dict[str, Any], index: Index) -> dict[str, Any]:
        """Write index and manifest, which completes the folder, and remove all our files that they do not name."""
        partial = self.out / ".index.new"
        with disk_errors(partial):
            index.write(partial)
        described = describe_file(partial)
        described["name"] = f"index-{described['sha256'][:16]}.safetensors"
        partial.replace(self.out / described["name"])
        manifest = {**manifest, "files": [described]}
        with disk_errors(self.out / MANIFEST):
            write_json(self.out / MANIFEST, manifest)
        keep = {file["name"] for file in files_of(manifest)}
        for pattern in ("latent-*.tar", "text-*.tar", "index*.safetensors", "empty_text.safetensors", ".index.new"):
            for path in self.out.glob(pattern):
                if path.name not in keep:
                    path.unlink()
        for pattern in (".latent-*", ".text-*", ".rank-*.json", ".*.tmp"):  # .tmp: left half written by a kill
            for path in self.out.glob(pattern):
                path.unlink(missing_ok=True)
        return manifest


class UnitWriter:
    """Writes the rows of one work unit into its tar, in order; `finish` gives tar and record their names."""

    def __init__(self, out: Path, unit: WorkUnit, record: Path, width: int) -> None:
        self.unit, self._path, self.width = unit, record, width
        self.written: list[Row] = []
        self.places: dict[str, tuple[int, int]] = {}
        self.rejects: dict[str, str] = {}
        self.masks: dict[str, int] = {}
        self._out, self._tar = out, TarWriter(out / f".{unit.name}.tar.tmp")

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._tar.__exit__(*error)

    def write(self, row: Row, content: bytes) -> None:
        """Add a row with its .safetensors member."""
        places = self._tar.write(row.key, {"safetensors": content, "json": to_json(row.about)})
        self.places[row.identity] = places["safetensors"]
        if flag := loss_masks.describe(content):
            self.masks[row.identity] = flag
        self.written.append(row)

    def reject(self, row: Row, reason: str) -> None:
        """Note the reason why a row is missing."""
        self.rejects[row.identity] = reason

    def finish(self) -> Record:
        """Complete the tar and write the work unit's record."""
        tar = None
        if self.written:
            tar = self._tar.finish(self._out / tar_name(self.unit.kind, self.written))
        record = Record(tar, self.places, self.rejects, self.width if self.written else 0, self.masks)
        with disk_errors(self._path):
            write_atomically(self._path, json.dumps(asdict(record)))
        return record


def _read_earlier(out: Path) -> _Earlier:
    """The intact part of a finished folder; ValueError if it holds something else than latents of this schema."""
    manifest = load_manifest(out)
    if manifest.get("kind") != "latent":
        raise ValueError(f"out={out} holds {manifest.get('kind')} shards, not latent shards; give another out=")
    if manifest.get("schema") != LATENT_SCHEMA:
        raise ValueError(
            f"out={out} holds latents of schema {manifest.get('schema')}, this version writes {LATENT_SCHEMA}; "
            "run the same command with another out="
        )
    whole = _intact(out, manifest)
    rejects = {}
    for line in (out / REJECTS).read_text(encoding="utf-8").split("\n") if (out / REJECTS).is_file() else []:
        if line and "identity" in (row := json.loads(line)):
            rejects[row["identity"]] = row["reason"]
    (described,) = manifest["files"]
    if described["name"] not in whole or file_hash(out / described["name"]) != described["sha256"]:
        return _Earlier({}, rejects=rejects)
    index = Index.read(out / described["name"])
    columns = {
        "latent": (index.identity, (index.shard, index.offset, index.size)),
        "text": (index.text_identity, (index.text_shard, index.text_offset, index.text_size)),
    }
    places = {}
    for kind, (identities, where) in columns.items():
        for identity, shard, offset, size in zip(identities, *(column.tolist() for column in where), strict=True):
            if (name := manifest[_TARS[kind]][shard]["name"]) in whole:
                places[identity.tobytes().hex()] = (name, offset, size)
    tars = {tar["name"]: tar for kind in _TARS.values() for tar in manifest[kind] if tar["name"] in whole}
    masks = {index.identity[window].tobytes().hex(): int(index.mask[window]) for window in np.flatnonzero(index.mask)}
    return _Earlier(manifest, places, rejects, tars, frozenset(index.source.tolist()), masks)


def _intact(out: Path, manifest: Mapping[str, Any]) -> set[str]:
    """Names of a manifest's files that exist in full size."""
    return {file["name"] for file in files_of(manifest) if _has_size(out, file)}


def _has_size(out: Path, file: Mapping[str, Any]) -> bool:
    path = out / file["name"]
    return path.is_file() and path.stat().st_size == file["bytes"]


def build_index(
    latents: Sequence[tuple[WorkUnit, Record]],
    texts: Sequence[tuple[WorkUnit, Record]],
    text_of: Mapping[str, str],
    group_of: Mapping[int, int],
) -> tuple[Index, dict[str, list[str]]]:
    """The index over all records, and the names of its `buckets` and `tags`.

    `text_of` is the identity of each caption's row, `group_of` the group of each file with near-duplicates.
    """
    text_places = [
        (number, *record.places[row.identity], row.identity)
        for number, (unit, record) in enumerate(texts)
        for row in unit.rows
    ]
    text_number = {identity: number for number, (*_, identity) in enumerate(text_places)}
    masks = {identity: flag for _, record in latents for identity, flag in record.masks.items()}
    clips: dict[tuple[str, int, str], list[tuple[Any, tuple[int, int, int]]]] = {}
    shard = 0
    for unit, record in latents:
        for row in unit.rows:
            if place := record.places.get(row.identity):
                clips.setdefault(row.clip, []).append((row, (shard, *place)))  # type: ignore[attr-defined]
        shard += record.tar is not None
    rows = [row for members in clips.values() for row, _ in members]
    places = [place for members in clips.values() for _, place in members]
    firsts = [members[0][0] for members in clips.values()]
    sources = [int(first.entry.key, 16) for first in firsts]
    texts_of = [dict.fromkeys(text_of[caption] for caption in first.captions) for first in firsts]
    buckets = list(dict.fromkeys(str(first.bucket) for first in firsts))
    bucket_number = {bucket: number for number, bucket in enumerate(buckets)}
    tags_of = [first.entry.about.get("tags", []) for first in firsts]
    tags = list(dict.fromkeys(tag for own in tags_of for tag in own))
    tag_number = {tag: number for number, tag in enumerate(tags)}
    shards, offsets, sizes = _columns(places, 3)
    text_shards, text_offsets, text_sizes = _columns([place[:3] for place in text_places], 3)
    index = Index(
        bucket=np.array([bucket_number[str(first.bucket)] for first in firsts], dtype=np.int32),
        source=np.array(sources, dtype=np.uint64),
        group=np.array([group_of.get(source, source) for source in sources], dtype=np.uint64),
        weight=np.array([first.entry.about.get("weight", 1.0) for first in firsts], dtype=np.float32),
        loss_weight=np.array([first.entry.about.get("loss_weight", 1.0) for first in firsts], dtype=np.float32),
        windows=_ends([len(members) for members in clips.values()]),
        captions=_ends([len(own) for own in texts_of]),
        caption=np.array([text_number[identity] for own in texts_of for identity in own], dtype=np.int32),
        tags=_ends([len(own) for own in tags_of]),
        tag=np.array([tag_number[tag] for own in tags_of for tag in own], dtype=np.int32),
        shard=shards.astype(np.int32),
        offset=offsets,
        size=sizes,
        ids=pack_ids([row.key for row in rows]),
        identity=pack_identities([row.identity for row in rows]),
        mask=np.array([masks.get(row.identity, 0) for row in rows], dtype=np.uint8),
        text_shard=text_shards.astype(np.int32),
        text_offset=text_offsets,
        text_size=text_sizes,
        text_identity=pack_identities([identity for *_, identity in text_places]),
    )
    return index, {"buckets": buckets, "tags": tags}


def _columns(rows: Sequence[Sequence[int]], count: int) -> Any:
    return np.array(rows, dtype=np.int64).reshape(-1, count).T


def _ends(counts: list[int]) -> Any:
    """Running sums from 0: where each of the given counts begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
