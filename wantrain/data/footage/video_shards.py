"""Video shards: tars that hold the original files of footage, their masks, and a .json with what shard.py found.

An index beside them says the same of all files, so that the work can be planned before a tar is there.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from webdataset import tariterators

from wantrain.data.footage.probe import Footage
from wantrain.data.rejects import IMAGES, VIDEOS
from wantrain.data.shards import TarWriter, check_shards, describe_file, disk_errors, to_json
from wantrain.util.files import sync_file
from wantrain.util.renamed import VIDEO_SAMPLE, upgraded_fields

#: Prefix of a mask's extension; a mask lies beside its video in the tar as KEY.mask.mp4.
MASK = "mask."


class VideoTars:
    """Writes files of footage into tars of about `shard_bytes`, each named by the hash of its content.

    A tar that exists already, from a finished run (`earlier` is its manifest) or from a killed one, is not written
    again. No tar is overwritten.
    """

    def __init__(self, out: Path, shard_bytes: int, earlier: Mapping[str, Any] | None) -> None:
        self.out, self.shard_bytes = out, shard_bytes
        self._earlier = {tar["name"]: tar for tar in (earlier or {"shards": []})["shards"]}
        self._samples: list[tuple[Footage, str, bytes]] = []
        self._size = 0
        self._shards: list[dict[str, Any]] = []
        for leftover in out.glob(".video-*.tmp"):
            leftover.unlink()

    def add(self, file: Footage, key: str, about: Mapping[str, Any]) -> None:
        """Add a file, its mask if it has one, and its .json."""
        self._samples.append((file, key, to_json(about)))
        self._size += file.size + len(self._samples[-1][2])
        if self._size >= self.shard_bytes:
            self._end()

    def finish(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Write the last tar and the index; the manifest's row of each tar, and that of the index."""
        if self._samples:
            self._end()
        self.index = write_index(self.out, {"kind": "video", "shards": self._shards})
        return self._shards, self.index

    def remove_others(self) -> None:
        """Remove all other tars of the folder, and their index."""
        own = {tar["name"] for tar in self._shards}
        for path in self.out.glob("video-*.tar"):
            if path.name not in own:
                path.unlink()
        for path in self.out.glob("index-*.jsonl"):
            if path.name != self.index["name"]:
                path.unlink()

    def _end(self) -> None:
        content = "\n".join(f"{key}.{file.extension} {about.decode()}" for file, key, about in self._samples)
        path = self.out / f"video-{hashlib.sha256(content.encode()).hexdigest()[:16]}.tar"
        row = self._earlier.get(path.name)
        if row is not None and path.is_file() and path.stat().st_size == row["bytes"]:
            self._shards.append(row)
        elif row is None and path.is_file():  # left by a killed run: a tar gets its name only when it is complete
            self._shards.append({**describe_file(path), "samples": len(self._samples)})
        else:
            with TarWriter(path.with_name(f".{path.name}.tmp")) as tar:
                for file, key, about in self._samples:
                    mask = {} if file.mask is None else {MASK + file.mask.suffix.lower()[1:]: file.mask.read_bytes()}
                    tar.write(key, {file.extension: file.read(), **mask, "json": about})
                self._shards.append(tar.finish(path))
        self._samples, self._size = [], 0


@dataclass(frozen=True)
class VideoSample:
    """One file of a video shard: its bytes, and in `about` what shard.py found."""

    key: str
    extension: str
    content: bytes
    about: dict[str, Any]


def read_video_shards(folder: Path, manifest: Mapping[str, Any]) -> Iterator[VideoSample]:
    """Every sample of a video folder, in order; each shard's hash is checked before it is read."""
    for shard in manifest["shards"]:
        check_shards(folder, {"kind": "video", "shards": [shard]})
        with (folder / shard["name"]).open("rb") as file:
            # Only webdataset's iteration over a tar, nothing above it: its default decoders run code from .pyd,
            # .pickle and .pth members, its opener runs paths that begin with "pipe:", its splitter depends on ranks.
            members = tariterators.tar_file_expander([{"url": shard["name"], "stream": file}])
            for sample in tariterators.group_by_keys(members):
                (extension,) = [key for key in sample if not key.startswith(("__", MASK)) and key != "json"]
                yield VideoSample(
                    sample["__key__"],
                    extension,
                    sample[extension],
                    upgraded_fields(json.loads(sample["json"]), VIDEO_SAMPLE),
                )


@dataclass(frozen=True)
class VideoEntry:
    """One file of a video shard, not read: where its bytes lie, and in `about` what shard.py found.

    `mask` is (extension, offset, size) of its mask, or None.
    """

    key: str
    extension: str
    tar: str
    offset: int
    size: int
    about: dict[str, Any]
    mask: tuple[str, int, int] | None = None


def scan_video_shards(folder: Path, manifest: Mapping[str, Any]) -> Iterator[VideoEntry]:
    """Every file of a video folder, in order, without reading videos: tar headers and .json members only.

    Checks the sizes of the tars, not their hashes. ValueError for a member that a video shard cannot have: one that is
    not a video, image or .json, a link, or a name with a folder in it.
    """
    check_shards(folder, manifest, hashes=False)
    for shard in manifest["shards"]:
        with _reading(folder / shard["name"]) as tar:
            videos, masks = dict[str, tarfile.TarInfo](), dict[str, tuple[str, int, int]]()
            for member in tar:
                key, extension = _split_name(member, shard["name"])
                if extension.startswith(MASK):
                    masks[key] = extension.removeprefix(MASK), member.offset_data, member.size
                    continue
                if extension != "json":
                    videos[key] = member
                    continue
                video, opened = videos.pop(key, None), tar.extractfile(member)
                if video is None or opened is None:
                    raise ValueError(
                        f"{folder / shard['name']}: {member.name} comes without its video; make the shards again with "
                        "shard.py"
                    )
                about = upgraded_fields(json.loads(opened.read()), VIDEO_SAMPLE)
                extension = _split_name(video, shard["name"])[1]
                place = shard["name"], video.offset_data, video.size
                yield VideoEntry(key, extension, *place, about, masks.pop(key, None))


def write_index(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write every file's entry as a line of the index, named by the hash of its content; the manifest's row."""
    partial = folder / ".index.new"
    with disk_errors(partial):
        with partial.open("wb") as file:
            file.writelines(to_json(asdict(entry)) + b"\n" for entry in scan_video_shards(folder, manifest))
        sync_file(partial)
    row = describe_file(partial)
    row["name"] = f"index-{row['sha256'][:16]}.jsonl"
    partial.replace(folder / row["name"])
    return row


def read_index(path: Path) -> Iterator[VideoEntry]:
    """What `scan_video_shards` gives, from an index."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            mask = None if row["mask"] is None else tuple(row.pop("mask"))
            yield VideoEntry(**{**row, "about": upgraded_fields(row["about"], VIDEO_SAMPLE), "mask": mask})


def _split_name(member: tarfile.TarInfo, shard: str) -> tuple[str, str]:
    """A member's key and extension; ValueError if a video shard cannot have such a member."""
    key, _, extension = member.name.partition(".")
    expected = extension == "json" or f".{extension.removeprefix(MASK)}" in VIDEOS | IMAGES
    if not member.isreg() or "/" in member.name or not expected:
        raise ValueError(
            f"{shard} holds {member.name!r}, which is not a video, image or .json; make the shards with shard.py"
        )
    return key, extension


@contextmanager
def _reading(path: Path) -> Iterator[tarfile.TarFile]:
    """An opened tar; damage is a ValueError that names it."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or make the shards again with shard.py") from error
