"""Surveys of footage: each file is decoded once from its first frame to its last, in a process that can be killed.

Decoding is the expensive part of shard.py. So surveys are stored in a hidden folder beside the shards, by the hash of
the file's bytes. After an edited caption, an added file or a killed run nothing is decoded twice.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from wantrain.data.footage import duplicates, headers
from wantrain.data.footage.captions import Annotation
from wantrain.data.footage.clips import VideoInfo
from wantrain.data.footage.decode_workers import DecodeOptions, Decoders, Job
from wantrain.data.footage.forward import places_of
from wantrain.data.footage.inspection import Inspection, Span
from wantrain.data.footage.probe import Footage, ReadOptions, is_picture, is_stream, probe, read_whole
from wantrain.data.footage.reader import Reader, SeekPoint
from wantrain.data.footage.scenes import SceneDetector
from wantrain.util import distributed
from wantrain.util.files import write_atomically
from wantrain.video import Frames

#: Version of the surveys; raise it when the same bytes would give another survey than before.
CODE = 5
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
    damaged     spans (begin, end) of damaged frames, in seconds (inspection.py), and in `fault` the first error
    interlaced  whether frames are interlaced
    passed_over whether decord fails on the damaged frames, so that they are passed over when others are read
    """

    info: VideoInfo
    thumbnails: NDArray[np.uint8]
    begins: list[float]
    seekable: list[int]
    damaged: list[Span] = field(default_factory=list)
    interlaced: bool = False
    fault: str = ""
    passed_over: bool = False

    @property
    def read_options(self) -> ReadOptions:
        """How the file's frames are read."""
        points = [SeekPoint.of(number, self.thumbnails[number]) for number in self.seekable]
        return ReadOptions(points, self.interlaced, self.passed_over)

    def packed(self) -> bytes:
        """The survey as bytes (safetensors)."""
        flags = self.interlaced, self.passed_over
        facts = np.array([self.info.height, self.info.width, self.info.end, *flags], dtype=np.float64)
        damaged = np.array(self.damaged, dtype=np.float64).reshape(-1, 2)
        fault = np.frombuffer(self.fault.encode(), dtype=np.uint8)
        begins, seekable = np.array(self.begins, dtype=np.float64), np.array(self.seekable, dtype=np.int64)
        times, thumbnails = self.info.times, self.thumbnails
        return save(
            {
                "facts": facts,
                "times": times,
                "thumbnails": thumbnails,
                "begins": begins,
                "marked": seekable,
                "damaged": damaged,
                "fault": fault,
            }
        )

    @staticmethod
    def unpacked(content: bytes) -> Survey:
        """The survey in these bytes."""
        tensors = load(content)
        height, width, end, interlaced, passed_over = tensors["facts"].tolist()
        info = VideoInfo(int(height), int(width), tensors["times"], end)
        return Survey(
            info,
            tensors["thumbnails"],
            tensors["begins"].tolist(),
            tensors["marked"].tolist(),
            [(begin, end) for begin, end in tensors["damaged"].tolist()],
            bool(interlaced),
            tensors["fault"].tobytes().decode(),
            bool(passed_over),
        )


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
        write_atomically(self._path(digest), content, sync=False)


def read_survey(request: dict[str, Any]) -> Iterator[Frames | None]:
    """Runs in a decoder process: decode a file to its end, with None as heartbeats, then yield its survey as bytes.

    ValueError with the reason if the file cannot be used.
    """
    member = request["member"]
    file = Footage(Path(request["path"]), request["name"], Annotation(), tuple(member) if member else None)
    with file.on_disk() as path:
        info, split = probe(path), request["split"]
        if is_picture(path):
            thumbnails, scenes = yield from _watched(read_whole(path, info), split=split and not info.is_image)
            yield _packed(Survey(info, thumbnails, scenes.begins(info.times) if scenes else [], []))
            return
        inspection = Inspection(path)
        thumbnails, scenes = yield from _watched(inspection.frames(), split=split and not info.is_image)
        passed_over = False
        if not _agrees(path, info, thumbnails):
            found, its_scenes = thumbnails, scenes
            try:
                thumbnails, scenes = yield from _watched(read_whole(path, info), split=split and not info.is_image)
            except ValueError:
                if not inspection.damaged or inspection.damaged[0][0] <= 0:
                    raise  # frames are found by their times after the first
                passed_over = True
                thumbnails, scenes = _with_gaps(found, inspection, info), its_scenes
        if not info.is_image:
            headers.refuse(headers.read_header(path), Path(file.name).name)
        seekable: list[int] = []
        if not (info.is_image or is_stream(path) or passed_over):
            for point in Reader(path, len(thumbnails)).tried_seek_points(thumbnails):
                seekable += [point.number] if point is not None else []
                yield None
    begins = scenes.begins(info.times) if scenes is not None else []
    damaged = [(begin + info.start, end + info.start) for begin, end in inspection.damaged]
    damaged += _missing(inspection, info) if passed_over else []
    flags = inspection.interlaced, inspection.fault, passed_over
    yield _packed(Survey(info, thumbnails, begins, seekable, damaged, *flags))


def _watched(
    frames: Iterator[Frames], *, split: bool
) -> Generator[None, None, tuple[NDArray[np.uint8], SceneDetector | None]]:
    """The thumbnails (F, GRID, GRID, 3) of frames, and the detector that saw them, if scenes are split."""
    thumbnails: list[duplicates.Thumbnail] = []
    scenes, last_heartbeat = SceneDetector() if split else None, time.monotonic()
    for frame in frames:
        thumbnails.append(duplicates.thumbnail(frame))
        if scenes is not None:
            scenes.watch(frame)
        if time.monotonic() - last_heartbeat > HEARTBEAT_SECONDS:
            last_heartbeat = time.monotonic()
            yield None
    return np.stack(thumbnails) if thumbnails else np.empty((0, 0, 0, 3), np.uint8), scenes


def _agrees(path: Path, info: VideoInfo, thumbnails: NDArray[np.uint8]) -> bool:
    """False if the file must be read with decord too: PyAV returned another number of frames, or another first one.

    That is so for damaged containers, and for more than 8 bits, which the two convert differently.
    """
    if len(thumbnails) != len(info.times):
        return False
    return is_stream(path) or np.array_equal(duplicates.thumbnail(next(read_whole(path, info))), thumbnails[0])


def _with_gaps(found: NDArray[np.uint8], inspection: Inspection, info: VideoInfo) -> NDArray[np.uint8]:
    """The thumbnails of all displayed frames, of those that were decoded: a missing one looks as the one before it."""
    there = np.zeros(len(info.times), dtype=np.int64)
    there[places_of(inspection.times, info.times)] = np.arange(len(found))
    return found[np.maximum.accumulate(there)]


def _missing(inspection: Inspection, info: VideoInfo) -> list[Span]:
    """The spans of frames that were not decoded, in seconds."""
    ends = [*info.times[1:], info.end]
    there = set(places_of(inspection.times, info.times).tolist())
    return [(begin, ends[number]) for number, begin in enumerate(info.times) if number not in there]


def _packed(survey: Survey) -> Frames:
    return np.frombuffer(survey.packed(), dtype=np.uint8)
