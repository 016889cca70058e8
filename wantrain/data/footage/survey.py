"""What a file of footage shows, from its first frame to its last: read once, in a process that can be killed.

Decoding everything is the dear part of shard.py. So what was found is kept in a hidden folder beside the shards, by the
hash of the file's bytes: whoever edits a caption, adds a file, or was killed decodes nothing twice.
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
from wantrain.data.footage.captions import Told
from wantrain.data.footage.clips import VideoInfo
from wantrain.data.footage.decode_workers import Decoders, Job
from wantrain.data.footage.probe import Footage, probe, read_whole
from wantrain.data.footage.reader import Reader, SeekPoint
from wantrain.data.footage.scenes import SceneDetector
from wantrain.util import distributed
from wantrain.video import Frames

#: Raise it whenever the same bytes would be found to show something else than before.
CODE = 3
#: A process that reads a file says so every so many seconds.
BEAT = 1.0
#: Processes that read footage, unless said otherwise: the cores, up to this many.
MOST_WORKERS = 8


@dataclass(frozen=True)
class Survey:
    """What a file shows, how each frame looks from afar (F, GRID, GRID, 3), when its scenes begin, in seconds, and
    the numbers of frames that a seek finds (reader.py).
    """

    found: VideoInfo
    thumbnails: NDArray[np.uint8]
    begins: list[float]
    marked: list[int]

    @property
    def seek_points(self) -> list[SeekPoint]:
        """The frames that a seek finds."""
        return [SeekPoint.of(number, self.thumbnails[number]) for number in self.marked]

    def packed(self) -> bytes:
        """As bytes."""
        facts = np.array([self.found.height, self.found.width, self.found.end], dtype=np.float64)
        begins, marked = np.array(self.begins, dtype=np.float64), np.array(self.marked, dtype=np.int64)
        times, thumbnails = self.found.times, self.thumbnails
        return save({"facts": facts, "times": times, "thumbnails": thumbnails, "begins": begins, "marked": marked})

    @staticmethod
    def unpacked(content: bytes) -> Survey:
        """From its bytes."""
        tensors = load(content)
        height, width, end = tensors["facts"].tolist()
        found = VideoInfo(int(height), int(width), tensors["times"], end)
        return Survey(found, tensors["thumbnails"], tensors["begins"].tolist(), tensors["marked"].tolist())


class Surveys:
    """The surveys of footage, in order: those an earlier run has kept in `folder`, the others made and kept.

    workers  processes that read; None: as many as there are cores, up to 8
    timeout  seconds that a file may take without giving another frame
    """

    def __init__(self, folder: Path, *, split: bool, workers: int | None, timeout: float) -> None:
        self.folder, self.split, self.workers, self.timeout = folder, split, workers, timeout
        folder.mkdir(exist_ok=True)

    def know_one_of(self, digests: Sequence[str]) -> bool:
        """True if an earlier run has read one of these files."""
        return any(self._place(digest).is_file() for digest in digests)

    def of(self, files: Sequence[tuple[Footage, str]]) -> Generator[Survey | str]:
        """The survey of each file (with its hash), or the reason why it cannot be used."""
        kept = [self._place(digest).is_file() for _, digest in files]
        jobs = [self._job(file) for (file, _), known in zip(files, kept, strict=True) if not known]
        with ExitStack() as stack:
            decoded: Iterator[Any] = iter(())
            if jobs:
                workers = min(self.workers or min(distributed.cores(), MOST_WORKERS), len(jobs))
                decoders = stack.enter_context(Decoders(read_survey, workers=workers, timeout=self.timeout))
                decoded = stack.enter_context(closing(decoders.decode(jobs)))
            for (_, digest), known in zip(files, kept, strict=True):
                if known:
                    yield Survey.unpacked(self._place(digest).read_bytes())
                    continue
                item = next(decoded)
                if item.frames is None:
                    yield item.reason
                    continue
                content = item.frames.tobytes()
                self._keep(digest, content)
                yield Survey.unpacked(content)

    def forget_all_but(self, digests: set[str]) -> None:
        """Remove what was kept of files that are gone, or were read otherwise."""
        keep = {self._place(digest).name for digest in digests}
        for path in self.folder.iterdir():
            if path.name not in keep:
                path.unlink()

    def _job(self, file: Footage) -> Job:
        request = {"path": str(file.path), "name": file.name, "member": file.member, "split": self.split}
        return Job({**request, "windows": [{}]})

    def _place(self, digest: str) -> Path:
        return self.folder / f"{digest[:32]}-{CODE}{'s' if self.split else ''}"

    def _keep(self, digest: str, content: bytes) -> None:
        beside = self._place(digest).with_suffix(".tmp")
        beside.write_bytes(content)
        beside.replace(self._place(digest))


def read_survey(request: dict[str, Any]) -> Iterator[Frames | None]:
    """What a decoder process does: read a file to its end, saying so now and then; then its survey, as bytes.

    ValueError with the reason if it cannot be used.
    """
    member = request["member"]
    file = Footage(Path(request["path"]), request["name"], Told(), tuple(member) if member else None)
    thumbnails: list[duplicates.Thumbnail] = []
    marked: list[int] = []
    with file.on_disk() as path:
        found = probe(path)
        scenes = SceneDetector() if request["split"] and not found.is_image else None
        said = time.monotonic()
        for frame in read_whole(path, found):
            thumbnails.append(duplicates.look(frame))
            if scenes is not None:
                scenes.watch(frame)
            if time.monotonic() - said > BEAT:
                said = time.monotonic()
                yield None
        if not found.is_image:
            headers.refuse(headers.read_header(path), Path(file.name).name)
            for point in Reader(path, len(thumbnails)).tried_seek_points(np.stack(thumbnails)):
                marked += [point.number] if point is not None else []
                yield None
    begins = scenes.begins(found.times) if scenes is not None else []
    yield np.frombuffer(Survey(found, np.stack(thumbnails), begins, marked).packed(), dtype=np.uint8)
