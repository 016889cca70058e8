"""The displayed frames of a video file in order, by number, with decord: right ones, and no more decoded than it takes.

Four things about decord were measured against PyAV and shape this file:
- Frames before an edit list, which no player shows, have negative timestamps and are counted, but not given.
- Where it seeks (also in `get_batch`, and in `skip_frames` past a keyframe) it lands on other frames than asked for
  after an edit list and in open groups of pictures, which x265 makes by default. Read forwards from the first frame it
  gives exactly the displayed frames; short of a keyframe it may skip, which decodes them and saves the rest, unless
  frames that are not displayed shift its count. So it seeks only to a `SeekPoint`: a keyframe where a seek was tried
  when the file was read from end to end, and gave the very frames that reading forwards gives. The frame there is
  compared again each time; if it looks otherwise, the file is read forwards.
- It decodes ahead without limit while its reader is idle, so a reader is never kept open while something else is done.
- With more than one thread it fails on healthy VP9 files.
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

from wantrain.data.footage.duplicates import Thumbnail, look
from wantrain.video import Frames

#: Seek points are at least so many frames apart, and at most so many in a file: one trial reads `TRIED` frames.
APART, MOST_MARKS, TRIED = 48, 256, 4
#: What a seek that fails raises, or the frames after it.
SEEK_FAILS = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, StopIteration)
#: A seek_point that is less far ahead is not worth a seek.
NEAR = 16


@dataclass(frozen=True)
class SeekPoint:
    """A frame by number that a seek finds, and the hash of what it looks like from afar."""

    number: int
    seen: str

    @staticmethod
    def of(number: int, picture: Thumbnail) -> SeekPoint:
        """The seek_point of a frame that looks so."""
        return SeekPoint(number, hashlib.sha256(picture.tobytes()).hexdigest()[:16])


def peek(path: Path) -> tuple[Frames, NDArray[np.float64]]:
    """The first frame (H, W, 3), and when each frame that is counted begins and ends, in seconds (F, 2).

    Any error of decord.
    """
    video = _open(path)
    spans = np.asarray(video.get_frame_timestamp(range(len(video))), dtype=np.float64).reshape(-1, 2)
    return _next_frame(video), spans


class Reader:
    """Frames of a file of `displayed` frames, each later than the one before. Any error of decord where decoding fails.

    Of `seek_points` it uses those that a seek still finds.
    """

    def __init__(self, path: Path, displayed: int, seek_points: Sequence[SeekPoint] = ()) -> None:
        self.path, self.displayed, self.seek_points = path, displayed, list(seek_points)
        self._start()

    def _start(self) -> None:
        self._video, self._next = _open(self.path), 0
        keys = self._video.get_key_indices()
        self._keys = keys if len(self._video) == self.displayed and keys[:1] == [0] else []

    def frame(self, number: int) -> Frames:
        """The frame (H, W, 3) of that number."""
        assert number >= self._next, f"frame {number} is behind"
        if (seek_point := self._seek_point_before(number)) is not None:
            found = self._found(seek_point)
            if found is None:
                self.seek_points = []
                self._start()
            elif seek_point.number == number:
                return found
        self._pass_over(number)
        return self._read()

    def _seek_point_before(self, number: int) -> SeekPoint | None:
        """The last seek_point up to that number, if it saves something."""
        place = bisect.bisect_right(self.seek_points, number, key=lambda seek_point: seek_point.number)
        seek_point = self.seek_points[place - 1] if place and self._keys else None
        return seek_point if seek_point is not None and seek_point.number >= self._next + NEAR else None

    def _found(self, seek_point: SeekPoint) -> Frames | None:
        """The frame of a seek_point, sought; None if another one is there."""
        try:
            frames = self._seek(seek_point.number)
        except SEEK_FAILS:
            return None
        return frames if SeekPoint.of(seek_point.number, look(frames)) == seek_point else None

    def _seek(self, number: int) -> Frames:
        """What decord takes for the frame of that number."""
        self._video.seek_accurate(number)
        self._next = number
        return self._read()

    def _read(self) -> Frames:
        self._next += 1
        return _next_frame(self._video)

    def _pass_over(self, end: int) -> None:
        """Read up to frame `end` without using what is read."""
        while self._next < end:
            after = bisect.bisect_right(self._keys, self._next)
            # To skip up to a keyframe would be a seek to it.
            count = (min(end, self._keys[after] - 1) if after < len(self._keys) else end) - self._next
            if self._keys and count > 0:
                self._video.skip_frames(count)
            else:
                count = 1
                self._video.next()
            self._next += count

    def tried_seek_points(self, thumbnails: NDArray[np.uint8]) -> Iterator[SeekPoint | None]:
        """For each keyframe that is tried, its seek point or None.

        `thumbnails` (F, ...) are those of the frames as read forwards.
        """
        apart = max(APART, self.displayed // MOST_MARKS)
        seek_points = [SeekPoint.of(number, picture) for number, picture in enumerate(thumbnails)]
        often, last = Counter(seek_point.seen for seek_point in seek_points), 0
        for key in self._keys:
            if key < last + apart or key + TRIED > self.displayed or often[seek_points[key].seen] > 1:
                continue
            last = key
            try:
                frames = [self._seek(key), *(self._read() for _ in range(1, TRIED))]
            except SEEK_FAILS:
                self._start()
                yield None
                continue
            right = all(np.array_equal(look(frame), thumbnails[key + i]) for i, frame in enumerate(frames))
            yield seek_points[key] if right else None


def _open(path: Path) -> decord.VideoReader:
    # fault_tol: where a frame cannot be decoded, decord would give its neighbour instead; this makes it raise.
    return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)


def _next_frame(video: decord.VideoReader) -> Frames:
    """The next displayed frame, (H, W, 3).

    decord2 takes the padding of its rows for a fourth channel where it happens to be as wide as one (widths 16, 24,
    32, 48, 96, 144): such a frame holds RGB in the first 3*W bytes of every row.
    """
    frame: Frames = torch.utils.dlpack.from_dlpack(video.next().to_dlpack()).numpy()  # as it is, not copied
    height, width, channels = frame.shape
    if channels == 3:
        return frame
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
