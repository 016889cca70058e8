"""Clips of a file, as arithmetic on the times of its frames: where each begins, and which frames it shows.

Time is kept as it is: frame k of a clip is what a player shows at start + k/fps. Three choices change that, each asked
for by name: `stride` leaves frames out, `native` takes a file's own frames whatever their rate, `stretch` slows down a
file that is too short.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wantrain import geometry
from wantrain.util.seeds import seed_at

#: Timestamps are compared with this tolerance (seconds): Matroska and WebM round them to whole milliseconds, and
#: decord gives them in float32 (half a millisecond of error after two hours).
EPSILON = 1e-3

#: Which clips of a file, or of each of its scenes, are taken.
CHOICES = ("all", "first", "middle", "random")


@dataclass(frozen=True)
class VideoInfo:
    """What a file shows: height and width after rotation, and when (seconds) each displayed frame begins.

    `times` ascend; `end` is when the last frame ends. An image has one frame.
    """

    height: int
    width: int
    times: NDArray[np.float64]
    end: float

    @property
    def is_image(self) -> bool:
        return len(self.times) == 1

    @property
    def start(self) -> float:
        """When its first frame begins, in seconds."""
        return float(self.times[0])

    @property
    def seconds(self) -> float:
        """How long it is on screen; an image takes no time."""
        return 0.0 if self.is_image else self.end - self.start

    @property
    def rate(self) -> float:
        """Its frames per second, on average; 1 of an image."""
        return len(self.times) / self.seconds if self.seconds > 0 else 1.0


@dataclass(frozen=True)
class Window:
    """A clip of a file: `num_frames` frames from `start` seconds on.

    stride  steps from one frame to the next: of the model's rate, or of the file's own frames if `native`. Above 1 the
            clip plays faster than the file, below 1 (stretched) slower.
    """

    start: float
    num_frames: int
    stride: float = 1.0
    native: bool = False


@dataclass(frozen=True)
class Cut:
    """How files are cut into clips.

    num_frames  the longest clip, 4k+1
    fps         the rate to resample to, by timestamps; None takes every file's own frames
    clips       all of a file, one after another, or the first, the middle or a random one
    stride      every n-th frame only
    stretch     a file that is too short for `num_frames` is slowed down to fill them
    lengths     the lengths that a clip may have, where not every 4k+1 is wanted
    seed        of the random clips
    """

    num_frames: int
    fps: float | None
    clips: str = "all"
    stride: int = 1
    stretch: bool = False
    lengths: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError if a choice is none; names the key."""
        geometry.check_num_frames(self.num_frames)
        for length in self.lengths:
            geometry.check_num_frames(length, key="lengths")
        if self.lengths and min(self.lengths) > self.num_frames:
            raise ValueError(
                f"lengths={list(self.lengths)}: none is within num_frames={self.num_frames}; raise it, or add a shorter"
            )
        if self.clips not in CHOICES:
            raise ValueError(f"clips={self.clips} is unknown; choose one of {', '.join(CHOICES)}")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be 1 or more; 1 takes every frame")

    def length(self, available: int) -> int:
        """The longest clip that so many frames can fill; 0 if there is none."""
        held = min(available, self.num_frames)
        if self.lengths:
            return max((length for length in self.lengths if length <= held), default=0)
        length = geometry.floor_num_frames(held)
        return length if length >= min(5, self.num_frames) else 0


def cut_windows(found: VideoInfo, cut: Cut, *, scenes: Sequence[float] = (), name: str = "") -> list[Window]:
    """The clips of a file, in order of time; each scene is cut as if it were a file of its own.

    scenes  when (seconds) a new scene begins, the first one excepted
    name    what random clips are drawn by, beside the seed: the same file gives the same clip

    ValueError with the reason if not even the shortest clip can be filled.
    """
    if found.is_image:
        if cut.lengths and 1 not in cut.lengths:
            raise ValueError(f"it is one frame, lengths={list(cut.lengths)} does not hold 1")
        return [Window(0.0, 1)]
    bounds = [found.start, *scenes, found.end]
    windows = []
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        # The frame that begins a scene is not to be reached by the tolerance of the one before.
        steps = _Steps(found, cut, begin, end - (EPSILON if end < found.end else 0.0))
        windows.extend(steps.windows(seed_at(cut.seed, "clip", name, number)))
    if not windows:
        rate = f"{cut.fps:g} fps" if cut.fps else "its own rate"
        every = f", every {cut.stride}th taken" if cut.stride > 1 else ""
        less = "each of its scenes less" if scenes else "less"
        least = min(cut.lengths, default=min(5, cut.num_frames))
        raise ValueError(f"it lasts {found.seconds:.2f} s, {less} than {least} frames at {rate}{every}")
    return windows


class _Steps:
    """One scene as a row of frames that a clip can be made of."""

    def __init__(self, found: VideoInfo, cut: Cut, begin: float, end: float) -> None:
        self.found, self.cut, self.begin, self.stride = found, cut, begin, float(cut.stride)
        if cut.fps is None:
            self.first, last = np.searchsorted(found.times, [begin - EPSILON, end - EPSILON]).tolist()
            frames = last - self.first
        else:
            # Frame k is wanted at begin + k/fps, and must begin before the scene ends.
            frames = (end - begin - EPSILON) * cut.fps
        self.available = max(0, int(np.floor((frames - (cut.fps is None)) / self.stride)) + 1)
        if cut.stretch and 1 < self.available < cut.num_frames:
            self.stride *= (
                self.available if cut.fps is None else (end - begin) * cut.fps / self.stride
            ) / cut.num_frames
            self.available = cut.num_frames

    def windows(self, draw: int) -> list[Window]:
        """The clips of this scene; none if it is too short. `draw` is a large random number."""
        length = self.cut.length(self.available)
        if length == 0:
            return []
        spare = self.available - length
        firsts = {
            "all": [i * length for i in range(self.available // length)],
            "first": [0],
            "middle": [spare // 2],
            "random": [draw % (spare + 1)],
        }[self.cut.clips]
        return [Window(self._time(first), length, self.stride, self.cut.fps is None) for first in firsts]

    def _time(self, step: int) -> float:
        if self.cut.fps is None:
            return float(self.found.times[self.first + int(step * self.stride + 1e-6)])
        return self.begin + step * self.stride / self.cut.fps


def frames_on_screen(found: VideoInfo, window: Window, fps: float) -> NDArray[np.int64]:
    """Which displayed frames (from 0) a window shows: at each wanted time, the last frame that has begun."""
    steps = np.arange(window.num_frames) * window.stride
    if window.native:
        first = int(np.searchsorted(found.times, window.start + EPSILON, side="right")) - 1
        places = first + np.floor(steps + 1e-6).astype(np.int64)
        return np.clip(places, 0, len(found.times) - 1)
    places = np.searchsorted(found.times, window.start + steps / fps + EPSILON, side="right") - 1
    return np.clip(places, 0, None)


def spans(found: VideoInfo, windows: Sequence[Window], fps: float) -> list[float]:
    """The seconds of footage that each window covers: up to the next one, or to the end of its last step."""
    covered = []
    for place, window in enumerate(windows):
        if window.native:
            after = int(frames_on_screen(found, window, fps)[-1]) + max(1, round(window.stride))
            end = float(found.times[after]) if after < len(found.times) else found.end
        else:
            end = window.start + window.num_frames * window.stride / fps
        limit = windows[place + 1].start if place + 1 < len(windows) else found.end
        covered.append(0.0 if found.is_image else max(0.0, min(end, limit) - window.start))
    return covered
