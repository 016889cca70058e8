"""Videos read forwards from the first frame, with PyAV: containers that decord fails on, and interlaced footage.

Its frames equal those of decord where both read a file with 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    return to_rgb(next(_decoded(path, deinterlace=False))), np.stack([begins, ends], axis=1)


class ForwardReader:
    """Reads frames of a video by number, in ascending order; `deinterlace` makes interlaced frames progressive.

    Raises whatever PyAV raises, and StopIteration past the last frame.
    """

    def __init__(self, path: Path, *, deinterlace: bool = False) -> None:
        self._frames = enumerate(_decoded(path, deinterlace=deinterlace))

    def frame(self, number: int) -> Frames:
        """The frame (H, W, 3) with this number."""
        return to_rgb(next(frame for place, frame in self._frames if place == number))


def to_rgb(frame: av.VideoFrame) -> Frames:
    """A frame as (H, W, 3) uint8, turned as its header says."""
    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)) if frame.rotation else pixels


def _decoded(path: Path, *, deinterlace: bool) -> Iterator[av.VideoFrame]:
    """Every displayed frame of the first video stream."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "NONE"  # several processes share the cores
        frames = container.decode(stream)
        yield from _deinterlaced(frames, stream) if deinterlace else frames


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
