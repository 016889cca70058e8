"""Videos read forwards from the first frame, with PyAV: containers and damage that decord fails on, and interlaced
footage.

Its frames equal those of decord where both read a file with 8 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import av.filter
import numpy as np
from numpy.typing import NDArray

from wantrain.video import Frames

#: One frame for each frame, computed from it and its neighbours; frames that are not interlaced stay as they are.
DEINTERLACE = "bwdif", "mode=send_frame:deint=interlaced"


def peek_forward(path: Path) -> tuple[Frames, NDArray[np.float64]]:
    """The first frame (H, W, 3), and when each displayed frame begins and ends, (F, 2) in seconds.

    Raises whatever PyAV raises.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        unit = float(stream.time_base or 1)
        begins = np.array(sorted({packet.pts for packet in packets if packet.pts is not None}), dtype=np.float64) * unit
        last = max((packet for packet in packets if packet.pts is not None), key=lambda packet: packet.pts or 0)
        gap = float(np.median(np.diff(begins))) if len(begins) > 1 else 0.0
        ends = np.append(begins[1:], begins[-1] + (float(last.duration or 0) * unit or gap))
    return first_frame(path), np.stack([begins, ends], axis=1)


def first_frame(path: Path) -> Frames:
    """The first displayed frame (H, W, 3) that can be decoded. Raises whatever PyAV raises; StopIteration for none."""
    return to_rgb(next(_decoded(path, deinterlace=False, damaged=True)))


class ForwardReader:
    """Reads frames of a video by number, in ascending order; `deinterlace` makes interlaced frames progressive.

    times  when each frame begins, in seconds, where frames may be missing: damaged ones are passed over, and the others
           are found by their time
    Raises whatever PyAV raises, and ValueError for a missing frame.
    """

    def __init__(self, path: Path, times: NDArray[np.float64] | None = None, *, deinterlace: bool = False) -> None:
        frames = _decoded(path, deinterlace=deinterlace, damaged=times is not None)
        self._frames = enumerate(frames) if times is None else _by_time(frames, times)

    def frame(self, number: int) -> Frames:
        """The frame (H, W, 3) with this number."""
        place, frame = next(((place, frame) for place, frame in self._frames if place >= number), (-1, None))
        if frame is None or place != number:
            raise ValueError(f"frame {number} is missing")
        return to_rgb(frame)


def places_of(found: Sequence[float], times: NDArray[np.float64]) -> NDArray[np.int64]:
    """Numbers of the frames, of those that begin at `times`, that were found at these times after the first one's."""
    relative = np.asarray(found, dtype=np.float64) - found[0]
    return np.abs(relative[:, None] - (times - times[0])[None]).argmin(axis=1)


def to_rgb(frame: av.VideoFrame) -> Frames:
    """A frame as (H, W, 3) uint8, turned as its header says."""
    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)) if frame.rotation else pixels


def _by_time(frames: Iterator[av.VideoFrame], times: NDArray[np.float64]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames with their numbers among those that begin at `times`, of which the first one is there."""
    first: float | None = None
    for frame in frames:
        first = float(frame.time or 0.0) if first is None else first
        yield int(places_of([first, float(frame.time or 0.0)], times)[1]), frame


def _decoded(path: Path, *, deinterlace: bool, damaged: bool = False) -> Iterator[av.VideoFrame]:
    """Every displayed frame of the first video stream; with `damaged`, what cannot be decoded is passed over."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "NONE"  # several processes share the cores
        frames = _sound(container, stream) if damaged else container.decode(stream)
        yield from _deinterlaced(frames, stream) if deinterlace else frames


def _sound(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames that can be decoded."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.error.FFmpegError):
            yield from packet.decode()


def _deinterlaced(frames: Iterator[av.VideoFrame], stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    graph = av.filter.Graph()
    graph.link_nodes(graph.add_buffer(template=stream), graph.add(*DEINTERLACE), graph.add("buffersink")).configure()
    for frame in frames:
        graph.vpush(frame)
        yield from _pulled(graph)
    graph.vpush(None)
    yield from _pulled(graph)


def _pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
