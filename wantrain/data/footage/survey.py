"""Surveys of footage: each file is decoded once from its first frame to its last, in a process that can be killed.

Decoding is the expensive part of shard.py. So surveys are stored in a hidden folder beside the shards, by the hash of
the file's bytes. After an edited caption, an added file or a killed run nothing is decoded twice.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from wantrain.data.footage import duplicates, headers
from wantrain.data.footage.captions import Annotation
from wantrain.data.footage.clips import VideoInfo
from wantrain.data.footage.decode_workers import DecodeOptions, Decoders, Job
from wantrain.data.footage.probe import Footage, probe, read_whole
from wantrain.data.footage.reader import Reader, SeekPoint
from wantrain.data.footage.scenes import SceneDetector
from wantrain.util import distributed
from wantrain.video import Frames

#: Version of the surveys; raise it when the same bytes would give another survey than before.
CODE = 3
#: Seconds between heartbeats of a process that decodes a file.
HEARTBEAT_SECONDS = 1.0
#: Default number of decoder processes: the cores, up to this many.
MOST_WORKERS = 8


@dataclass(frozen=True)
class Survey:
    """What decoding a whole file found.

    info        size and timestamps
    thumbnails  (F, GRID, GRID, 3), one per displayed frame
    begins      when each scene but the first begins, in seconds
    seekable    numbers of the frames that a seek finds exactly (reader.py)
    """

    info: VideoInfo
    thumbnails: NDArray[np.uint8]
    begins: list[float]
    seekable: list[int]

    @property
    def seek_points(self) -> list[SeekPoint]:
        """The seek points of the file."""
        return [SeekPoint.of(number, self.thumbnails[number]) for number in self.seekable]

    def packed(self) -> bytes:
        """The survey as bytes (safetensors)."""
        facts = np.array([self.info.height, self.info.width, self.info.end], dtype=np.float64)
        begins, seekable = np.array(self.begins, dtype=np.float64), np.array(self.seekable, dtype=np.int64)
        times, thumbnails = self.info.times, self.thumbnails
        return save({"facts": facts, "times": times, "thumbnails": thumbnails, "begins": begins, "marked": seekable})

    @staticmethod
    def unpacked(content: bytes) -> Survey:
        """The survey in these bytes."""
        tensors = load(content)
        height, width, end = tensors["facts"].tolist()
        info = VideoInfo(int(height), int(width), tensors["times"], end)
        return Survey(info, tensors["thumbnails"], tensors["begins"].tolist(), tensors["marked"].tolist())


class Surveys:
    """Surveys of footage, in order: read from `folder` where an earlier run stored them, otherwise made and stored.

    split  detect scenes too
    """

    def __init__(self, folder: Path, *, split: bool, decode: DecodeOptions) -> None:
        self.folder, self.split, self.decode = folder, split, decode

    def has_any(self, digests: Sequence[str]) -> bool:
        """True if the survey of one of these files is stored."""
        return any(self._path(digest).is_file() for digest in digests)

    def of(self, files: Sequence[tuple[Footage, str]]) -> Generator[Survey | str]:
        """The survey of each (file, digest), or the reason why the file cannot be used."""
        stored = [self._path(digest).is_file() for _, digest in files]
        jobs = [self._job(file) for (file, _), is_stored in zip(files, stored, strict=True) if not is_stored]
        with ExitStack() as stack:
            decoded: Iterator[Any] = iter(())
            if jobs:
                self.folder.mkdir(exist_ok=True)
                workers = min(self.decode.workers or min(distributed.cores(), MOST_WORKERS), len(jobs))
                decoders = stack.enter_context(Decoders(read_survey, workers=workers, timeout=self.decode.timeout))
                decoded = stack.enter_context(closing(decoders.decode(jobs)))
            for (_, digest), is_stored in zip(files, stored, strict=True):
                if is_stored:
                    yield Survey.unpacked(self._path(digest).read_bytes())
                    continue
                item = next(decoded)
                if item.frames is None:
                    yield item.reason
                    continue
                content = item.frames.tobytes()
                self._store(digest, content)
                yield Survey.unpacked(content)

    def remove_all_but(self, digests: set[str]) -> None:
        """Remove the surveys of files that are gone, or that were made with other options."""
        keep = {self._path(digest).name for digest in digests}
        for path in self.folder.glob("*"):
            if path.name not in keep:
                path.unlink()

    def _job(self, file: Footage) -> Job:
        request = {"path": str(file.path), "name": file.name, "member": file.member, "split": self.split}
        return Job({**request, "windows": [{}]})

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest[:32]}-{CODE}{'s' if self.split else ''}"

    def _store(self, digest: str, content: bytes) -> None:
        partial = self._path(digest).with_suffix(".tmp")
        partial.write_bytes(content)
        partial.replace(self._path(digest))


def read_survey(request: dict[str, Any]) -> Iterator[Frames | None]:
    """Runs in a decoder process: decode a file to its end, with None as heartbeats, then yield its survey as bytes.

    ValueError with the reason if the file cannot be used.
    """
    member = request["member"]
    file = Footage(Path(request["path"]), request["name"], Annotation(), tuple(member) if member else None)
    thumbnails: list[duplicates.Thumbnail] = []
    seekable: list[int] = []
    with file.on_disk() as path:
        info = probe(path)
        scenes = SceneDetector() if request["split"] and not info.is_image else None
        last_heartbeat = time.monotonic()
        for frame in read_whole(path, info):
            thumbnails.append(duplicates.thumbnail(frame))
            if scenes is not None:
                scenes.watch(frame)
            if time.monotonic() - last_heartbeat > HEARTBEAT_SECONDS:
                last_heartbeat = time.monotonic()
                yield None
        if not info.is_image:
            headers.refuse(headers.read_header(path), Path(file.name).name)
            for point in Reader(path, len(thumbnails)).tried_seek_points(np.stack(thumbnails)):
                seekable += [point.number] if point is not None else []
                yield None
    begins = scenes.begins(info.times) if scenes is not None else []
    yield np.frombuffer(Survey(info, np.stack(thumbnails), begins, seekable).packed(), dtype=np.uint8)
