"""Clips of a file, computed from its frame timestamps: where each clip begins, and which frames it shows.

Frame k of a clip is what a player shows at start + k/fps, so playback speed is unchanged. Three options change that:
`stride` skips frames, `native` takes a file's own frames whatever their rate, `stretch` slows down a file that is too
short.
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

#: Which clips of a file, or of each of its scenes, are used.
CHOICES = ("all", "first", "middle", "random")


@dataclass(frozen=True)
class VideoInfo:
    """Facts of a video or image file.

    height, width  in pixels, after rotation
    times          (F,) when each displayed frame begins, in seconds, ascending; an image has one frame
    end            when the last frame ends, in seconds
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
        """When the first frame begins, in seconds."""
        return float(self.times[0])

    @property
    def seconds(self) -> float:
        """Duration; 0 for an image."""
        return 0.0 if self.is_image else self.end - self.start

    @property
    def rate(self) -> float:
        """Mean frames per second; 1 for an image."""
        return len(self.times) / self.seconds if self.seconds > 0 else 1.0


@dataclass(frozen=True)
class Window:
    """Position of a clip in a file: `num_frames` frames from `start` seconds on.

    stride  distance of consecutive frames, in frames of the model's rate, or in frames of the file if `native`. Above 1
            the clip plays faster than the file, below 1 (stretched) slower.
    """

    start: float
    num_frames: int
    stride: float = 1.0
    native: bool = False


@dataclass(frozen=True)
class ClipOptions:
    """How files are cut into clips.

    num_frames  frames of the longest clip, 4k+1
    fps         rate to resample to, by timestamps; None keeps every file's own frames
    clips       "all" clips of a file, one after another, or only the "first", "middle" or a "random" one
    stride      use every n-th frame only
    stretch     slow down a file that is too short for `num_frames`
    lengths     lengths that a clip may have, each 4k+1; empty: every 4k+1
    seed        of random clips

    ValueError names the key that is out of range.
    """

    num_frames: int
    fps: float | None
    clips: str = "all"
    stride: int = 1
    stretch: bool = False
    lengths: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        geometry.check_num_frames(self.num_frames)
        for length in self.lengths:
            geometry.check_num_frames(length, key="lengths")
        if self.lengths and min(self.lengths) > self.num_frames:
            raise ValueError(
                f"lengths={list(self.lengths)}: all are longer than num_frames={self.num_frames}; raise num_frames, or "
                "add a shorter length"
            )
        if self.clips not in CHOICES:
            raise ValueError(f"clips={self.clips} is unknown; choose one of {', '.join(CHOICES)}")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be 1 or more; 1 takes every frame")

    def length(self, available: int) -> int:
        """Frames of the longest clip that `available` frames can fill; 0 if there is none."""
        most = min(available, self.num_frames)
        if self.lengths:
            return max((length for length in self.lengths if length <= most), default=0)
        length = geometry.floor_num_frames(most)
        return length if length >= min(5, self.num_frames) else 0


def cut_windows(info: VideoInfo, options: ClipOptions, *, scenes: Sequence[float] = (), name: str = "") -> list[Window]:
    """The clips of a file, in order of time; each scene is treated as a file of its own.

    scenes  when each scene but the first begins, in seconds
    name    identifies the file for random clips: the same name and seed give the same clip

    ValueError, as a reason that follows the file's name, if the file is shorter than the shortest clip.
    """
    if info.is_image:
        if options.lengths and 1 not in options.lengths:
            raise ValueError(
                f"it is one frame, and lengths={list(options.lengths)} does not contain 1; add 1 to use images"
            )
        return [Window(0.0, 1)]
    bounds = [info.start, *scenes, info.end]
    windows = []
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        # The tolerance must not reach the first frame of the next scene.
        scene = _SceneClips(info, options, begin, end - (EPSILON if end < info.end else 0.0))
        windows.extend(scene.windows(seed_at(options.seed, "clip", name, number)))
    if not windows:
        rate = f"{options.fps:g} fps" if options.fps else "its own rate"
        every = f", every {options.stride}th taken" if options.stride > 1 else ""
        less = "each of its scenes less" if scenes else "less"
        least = min(options.lengths, default=min(5, options.num_frames))
        raise ValueError(f"it lasts {info.seconds:.2f} s, {less} than {least} frames at {rate}{every}")
    return windows


class _SceneClips:
    """One scene of a file, and the clips that fit into it."""

    def __init__(self, info: VideoInfo, options: ClipOptions, begin: float, end: float) -> None:
        self.info, self.options, self.begin, self.stride = info, options, begin, float(options.stride)
        if options.fps is None:
            self.first, last = np.searchsorted(info.times, [begin - EPSILON, end - EPSILON]).tolist()
            frames = last - self.first
        else:
            # Frame k of the scene lies at begin + k/fps, which must be before the scene ends.
            frames = (end - begin - EPSILON) * options.fps
        self.available = max(0, int(np.floor((frames - (options.fps is None)) / self.stride)) + 1)
        if options.stretch and 1 < self.available < options.num_frames:
            self.stride *= (
                self.available if options.fps is None else (end - begin) * options.fps / self.stride
            ) / options.num_frames
            self.available = options.num_frames

    def windows(self, draw: int) -> list[Window]:
        """The clips of this scene; none if it is too short. `draw` is a large random number, for a random clip."""
        length = self.options.length(self.available)
        if length == 0:
            return []
        spare = self.available - length
        firsts = {
            "all": [i * length for i in range(self.available // length)],
            "first": [0],
            "middle": [spare // 2],
            "random": [draw % (spare + 1)],
        }[self.options.clips]
        return [Window(self._time(first), length, self.stride, self.options.fps is None) for first in firsts]

    def _time(self, step: int) -> float:
        if self.options.fps is None:
            return float(self.info.times[self.first + int(step * self.stride + 1e-6)])
        return self.begin + step * self.stride / self.options.fps


def frames_on_screen(info: VideoInfo, window: Window, fps: float) -> NDArray[np.int64]:
    """Numbers (from 0) of the displayed frames that a window shows: at each time, the last frame that has begun."""
    steps = np.arange(window.num_frames) * window.stride
    if window.native:
        first = int(np.searchsorted(info.times, window.start + EPSILON, side="right")) - 1
        places = first + np.floor(steps + 1e-6).astype(np.int64)
        return np.clip(places, 0, len(info.times) - 1)
    places = np.searchsorted(info.times, window.start + steps / fps + EPSILON, side="right") - 1
    return np.clip(places, 0, None)


def spans(info: VideoInfo, windows: Sequence[Window], fps: float) -> list[float]:
    """Seconds of footage that each window covers: up to the next window, or to the end of its last frame."""
    covered = []
    for place, window in enumerate(windows):
        if window.native:
            after = int(frames_on_screen(info, window, fps)[-1]) + max(1, round(window.stride))
            end = float(info.times[after]) if after < len(info.times) else info.end
        else:
            end = window.start + window.num_frames * window.stride / fps
        limit = windows[place + 1].start if place + 1 < len(windows) else info.end
        covered.append(0.0 if info.is_image else max(0.0, min(end, limit) - window.start))
    return covered
