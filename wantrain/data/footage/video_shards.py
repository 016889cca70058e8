"""Video shards: tars that hold files of footage as they came, their masks, and what shard.py found out about each."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset import tariterators

from wantrain.data.footage.probe import Footage
from wantrain.data.rejects import IMAGES, VIDEOS
from wantrain.data.shards import TarWriter, check_shards, describe_file, to_json
from wantrain.util.renamed import VIDEO_SAMPLE, upgraded_fields

#: What the extension of a mask begins with, which lies beside its video in a tar: KEY.mask.mp4.
MASK = "mask."


class VideoTars:
    """Files of footage gathered into tars of about `shard_bytes`, each named after what is in it.

    A tar that is there already, of `earlier` (the manifest of a finished run) or of one that was killed, is not written
    again; none is written over.
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
        """Add a file, its mask if it has one, and what is said about it."""
        self._samples.append((file, key, to_json(about)))
        self._size += file.size + len(self._samples[-1][2])
        if self._size >= self.shard_bytes:
            self._end()

    def finish(self) -> list[dict[str, Any]]:
        """What a manifest says about each tar."""
        if self._samples:
            self._end()
        return self._shards

    def remove_others(self) -> None:
        """Remove tars that are none of these."""
        mine = {tar["name"] for tar in self._shards}
        for path in self.out.glob("video-*.tar"):
            if path.name not in mine:
                path.unlink()

    def _end(self) -> None:
        content = "\n".join(f"{key}.{file.extension} {about.decode()}" for file, key, about in self._samples)
        path = self.out / f"video-{hashlib.sha256(content.encode()).hexdigest()[:16]}.tar"
        told = self._earlier.get(path.name)
        if told is not None and path.is_file() and path.stat().st_size == told["bytes"]:
            self._shards.append(told)
        elif told is None and path.is_file():  # of a run that was killed: a tar has its name only when it is whole
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
    """One file of a video shard: its bytes and what shard.py found out about it."""

    key: str
    extension: str
    content: bytes
    about: dict[str, Any]


def read_video_shards(folder: Path, manifest: Mapping[str, Any]) -> Iterator[VideoSample]:
    """Every sample of a video folder, in order; each shard's hash is checked before it is read."""
    for shard in manifest["shards"]:
        check_shards(folder, {"kind": "video", "shards": [shard]})
        with (folder / shard["name"]).open("rb") as file:
            # webdataset's own iteration over a tar, and nothing above it: its default decoders run code from .pyd,
            # .pickle and .pth members, its opener runs paths that begin with "pipe:", its splitter looks at ranks.
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
    """One file of a video shard that has not been read: where its bytes lie, and what shard.py found out about it.

    `mask` is (extension, offset, size) of the mask that came with it, or None.
    """

    key: str
    extension: str
    tar: str
    offset: int
    size: int
    about: dict[str, Any]
    mask: tuple[str, int, int] | None = None


def scan_video_shards(folder: Path, manifest: Mapping[str, Any]) -> Iterator[VideoEntry]:
    """Every file of a video folder, in order, without reading videos: headers and .json members only.

    Sizes of the tars are checked, hashes are not. ValueError for a member that no video shard has: what is no video or
    image, a link, a name that leads out of the folder.
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
                    raise ValueError(f"{folder / shard['name']}: {member.name} comes without its video")
                about = upgraded_fields(json.loads(opened.read()), VIDEO_SAMPLE)
                extension = _split_name(video, shard["name"])[1]
                place = shard["name"], video.offset_data, video.size
                yield VideoEntry(key, extension, *place, about, masks.pop(key, None))


def _split_name(member: tarfile.TarInfo, shard: str) -> tuple[str, str]:
    """A member's key and extension; ValueError if no video shard has such a member."""
    key, _, extension = member.name.partition(".")
    known = extension == "json" or f".{extension.removeprefix(MASK)}" in VIDEOS | IMAGES
    if not member.isreg() or "/" in member.name or not known:
        raise ValueError(
            f"{shard} holds {member.name!r}, which is no video, image or .json: refused; make it with shard.py"
        )
    return key, extension


@contextmanager
def _reading(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar, opened; damage is a ValueError that names it."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or make the shards again with shard.py") from error
