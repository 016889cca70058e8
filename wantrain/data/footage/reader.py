"""The displayed frames of a video file by number, with decord: exact frames, with as little decoding as possible.

Four properties of decord, measured against PyAV, shape this file:
- Frames before an edit list, which players do not show, have negative timestamps. decord counts them, but does not
  return them.
- A seek (also in `get_batch`, and in `skip_frames` past a keyframe) can land on a wrong frame: after an edit list, and
  in open groups of pictures, which x265 makes by default. Reading forwards from the first frame returns exactly the
  displayed frames. Skipping short of the next keyframe is exact too, unless frames that are not displayed shift the
  count. So this reader seeks only to a `SeekPoint`: a keyframe where a trial seek, made when the file was read from end
  to end, returned the same frames as reading forwards. Each later seek compares the frame again; if it differs, the
  file is read forwards.
- decord decodes ahead without limit while its reader is idle, so no reader is kept open during other work.
- With more than one thread decord fails on healthy VP9 files.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import decord
import numpy as np
import torch
from numpy.typing import NDArray

from wantrain.data.footage.duplicates import Thumbnail, thumbnail
from wantrain.data.footage.forward import first_frame
from wantrain.video import Frames

#: Seek points are at least so many frames apart, and at most so many per file; a trial seek compares `TRIED` frames.
APART, MOST_SEEK_POINTS, TRIED = 48, 256, 4
#: Exceptions of a failed seek, or of reading the frames after it.
SEEK_FAILS = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, StopIteration)
#: A seek point fewer frames ahead than this is not worth a seek.
NEAR = 16


@dataclass(frozen=True)
class SeekPoint:
    """The number of a frame that a seek finds exactly, and the hash of its thumbnail."""

    number: int
    seen: str

    @staticmethod
    def of(number: int, picture: Thumbnail) -> SeekPoint:
        """The seek point of a frame with this thumbnail."""
        return SeekPoint(number, hashlib.sha256(picture.tobytes()).hexdigest()[:16])


def peek(path: Path) -> tuple[Frames, NDArray[np.float64]]:
    """The first frame (H, W, 3), and when each counted frame begins and ends, (F, 2) in seconds.

    decord decodes ahead, so it may fail here on a later frame: then PyAV reads the first. Raises whatever they raise.
    """
    video = _open(path)
    spans = np.asarray(video.get_frame_timestamp(range(len(video))), dtype=np.float64).reshape(-1, 2)
    try:
        return _next_frame(video), spans
    except SEEK_FAILS:
        return first_frame(path), spans


class Reader:
    """Reads frames of a file with `displayed` frames, in ascending order. Raises whatever decord raises.

    `seek_points` are used as long as seeks to them return the expected frames.
    """

    def __init__(self, path: Path, displayed: int, seek_points: Sequence[SeekPoint] = ()) -> None:
        self.path, self.displayed, self.seek_points = path, displayed, list(seek_points)
        self._start()

    def _start(self) -> None:
        self._video, self._next = _open(self.path), 0
        keys = self._video.get_key_indices()
        self._keys = keys if len(self._video) == self.displayed and keys[:1] == [0] else []

    def frame(self, number: int) -> Frames:
        """The frame (H, W, 3) with this number."""
        assert number >= self._next, f"frame {number} is behind"
        if (seek_point := self._seek_point_before(number)) is not None:
            frame = self._frame_at(seek_point)
            if frame is None:
                self.seek_points = []
                self._start()
            elif seek_point.number == number:
                return frame
        self._pass_over(number)
        return self._read()

    def _seek_point_before(self, number: int) -> SeekPoint | None:
        """The last seek point up to this number, if seeking to it saves decoding."""
        place = bisect.bisect_right(self.seek_points, number, key=lambda seek_point: seek_point.number)
        seek_point = self.seek_points[place - 1] if place and self._keys else None
        return seek_point if seek_point is not None and seek_point.number >= self._next + NEAR else None

    def _frame_at(self, seek_point: SeekPoint) -> Frames | None:
        """Seek to a seek point; its frame, or None if another frame is there."""
        try:
            frame = self._seek(seek_point.number)
        except SEEK_FAILS:
            return None
        return frame if SeekPoint.of(seek_point.number, thumbnail(frame)) == seek_point else None

    def _seek(self, number: int) -> Frames:
        """The frame that decord returns for a seek to this number."""
        self._video.seek_accurate(number)
        self._next = number
        return self._read()

    def _read(self) -> Frames:
        self._next += 1
        return _next_frame(self._video)

    def _pass_over(self, end: int) -> None:
        """Advance to frame `end`."""
        while self._next < end:
            after = bisect.bisect_right(self._keys, self._next)
            # Skipping up to a keyframe would be a seek to it.
            count = (min(end, self._keys[after] - 1) if after < len(self._keys) else end) - self._next
            if self._keys and count > 0:
                self._video.skip_frames(count)
            else:
                count = 1
                self._video.next()
            self._next += count

    def tried_seek_points(self, thumbnails: NDArray[np.uint8]) -> Iterator[SeekPoint | None]:
        """Try a seek to each candidate keyframe: its seek point, or None if the seek returns other frames.

        `thumbnails` (F, GRID, GRID, 3) are of the frames as read forwards.
        """
        apart = max(APART, self.displayed // MOST_SEEK_POINTS)
        seek_points = [SeekPoint.of(number, picture) for number, picture in enumerate(thumbnails)]
        counts, last = Counter(seek_point.seen for seek_point in seek_points), 0
        for key in self._keys:
            if key < last + apart or key + TRIED > self.displayed or counts[seek_points[key].seen] > 1:
                continue
            last = key
            try:
                frames = [self._seek(key), *(self._read() for _ in range(1, TRIED))]
            except SEEK_FAILS:
                self._start()
                yield None
                continue
            exact = all(np.array_equal(thumbnail(frame), thumbnails[key + i]) for i, frame in enumerate(frames))
            yield seek_points[key] if exact else None


def _open(path: Path) -> decord.VideoReader:
    # fault_tol: without it decord returns a neighbour in place of a frame that cannot be decoded; with it, it raises.
    return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)


def _next_frame(video: decord.VideoReader) -> Frames:
    """The next displayed frame, (H, W, 3).

    decord2 takes the padding of its rows for a fourth channel where it happens to be as wide as one (widths 16, 24,
    32, 48, 96, 144): such a frame holds RGB in the first 3*W bytes of every row.
    """
    frame: Frames = torch.utils.dlpack.from_dlpack(video.next().to_dlpack()).numpy()  # without a copy
    height, width, channels = frame.shape
    if channels == 3:
        return frame
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
