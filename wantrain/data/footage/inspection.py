"""One pass over a video that finds what a decoder conceals: damaged frames, and interlaced ones.

decord repairs a damaged frame from its neighbours and returns it like any other. ffmpeg's own decoders do so too, but
PyAV shows their error flags, the corrupt marks of packets, and their messages of errors. A frame that refers to a
damaged one shows the damage as well. So each error damages the frames from there to the next keyframe.

Not found: damage that a decoder does not notice. Of 12 places overwritten with 40 random bytes, 12 were found in
MPEG-4, 9 in H.264, none in HEVC; VP8, VP9 and raw video do not notice at all. Nor is interlaced footage without the
flag, as after a careless conversion.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import av.logging

from wantrain.data.footage.forward import to_rgb
from wantrain.video import Frames

#: Messages of decoders about metadata beside the picture.
HARMLESS = ("SEI", "APP", "ICC", "EXIF")
#: Messages about frames that are not there. A stream that was cut out of a longer one begins with them.
UNTIL_SECOND_KEYFRAME = ("mmco", "co located POCs", "Missing reference")
#: A video is interlaced if more than this share of its frames is.
INTERLACED = 0.1

Span = tuple[float, float]


@dataclass
class Inspection:
    """What decoding a whole video found, once `frames` has ended.

    times       when each displayed frame that was decoded begins, in seconds
    interlaced  whether more than a few frames are interlaced
    damaged     spans (begin, end) of damaged frames, in seconds from the first displayed frame on
    fault       the first error in the decoder's words; empty if there is none
    """

    path: Path
    times: list[float] = field(default_factory=list)
    interlaced: bool = False
    damaged: list[Span] = field(default_factory=list)
    fault: str = ""
    _packets: list[tuple[float, bool]] = field(default_factory=list)
    _keyframes: int = 0
    _faults: set[int] = field(default_factory=set)

    def frames(self) -> Iterator[Frames]:
        """Every displayed frame (H, W, 3), in order; ends early where the container is damaged."""
        flagged = 0
        for frame in self._decoded():
            self.times.append(float(frame.time or 0.0))
            flagged += frame.interlaced_frame
            yield to_rgb(frame)
        self.interlaced = flagged > INTERLACED * len(self.times)
        first = self.times[0] if self.times else 0.0
        self.damaged = [(begin - first, end - first) for begin, end in damaged_spans(self._packets, self._faults)]

    def _decoded(self) -> Iterator[av.VideoFrame]:
        level, repeats = av.logging.get_level(), av.logging.get_skip_repeated()
        av.logging.set_level(av.logging.ERROR)
        av.logging.set_skip_repeated(False)  # else a message would come with a later packet
        try:
            with av.logging.Capture() as log, av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                stream.codec_context.thread_type = "NONE"  # else a message could belong to another packet
                numbers: dict[int | None, int] = {}
                for packet in container.demux(stream):
                    yield from self._decode(packet, numbers, log)
        except av.error.FFmpegError as error:  # the container ends here; the survey compares the number of frames
            self._note(len(self._packets) - 1, str(error))
        finally:
            av.logging.set_level(level)
            av.logging.set_skip_repeated(repeats)

    def _decode(
        self, packet: av.Packet[av.VideoStream], numbers: dict[int | None, int], log: list[tuple[int, str, str]]
    ) -> Iterator[av.VideoFrame]:
        """The frames that come with a packet; errors are noted for the packet of the frame that they damage."""
        if packet.size:
            last = self._packets[-1][0] if self._packets else 0.0
            time = last if packet.pts is None else float(packet.pts * packet.time_base)
            numbers[packet.pts] = len(self._packets)
            self._packets.append((time, packet.is_keyframe))
        number = len(self._packets) - 1
        if log and packet.size and number > 0:
            _, name, message = log[0]  # of the container: it lost what lies between the last packet and this one
            self._note(number - 1, f"{name}: {message.strip()}")
        log.clear()
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            self._note(number, str(error))
            return
        self._keyframes += packet.is_keyframe
        harmless = HARMLESS + (UNTIL_SECOND_KEYFRAME if self._keyframes < 2 else ())
        for _, name, message in log:
            if not any(word in message for word in harmless):
                self._note(number, f"{name}: {message.strip()}")
        log.clear()
        if packet.is_corrupt:
            self._note(number, "a corrupt packet")
        for frame in frames:
            if frame.is_corrupt:
                self._note(numbers.get(frame.pts, number), "a frame with errors")
            yield frame

    def _note(self, number: int, fault: str) -> None:
        self._faults.add(max(number, 0))
        self.fault = self.fault or " ".join(fault.replace(str(self.path), "the file").split())[:120]


def damaged_spans(packets: list[tuple[float, bool]], faults: set[int]) -> list[Span]:
    """Spans of time whose frames are damaged, in order, of packets (time, is keyframe) in the order of decoding.

    A fault damages all frames that are decoded after it, up to the next keyframe; before a keyframe's time, where that
    fault lies in frames that are shown before the keyframe that precedes them in the stream (an open group).
    """
    keys = [number for number, (_, is_key) in enumerate(packets) if is_key]
    spans: list[Span] = []
    for fault in sorted(faults):
        if not packets:
            break
        place = bisect.bisect_right(keys, fault)
        stop = keys[place] if place < len(keys) else len(packets)
        begin = min(time for time, _ in packets[fault:stop])
        end = packets[stop][0] if stop < len(packets) else math.inf
        key_time = packets[keys[place - 1]][0] if place else -math.inf
        if packets[fault][0] < key_time:
            end = key_time
        if spans and begin <= spans[-1][1]:
            spans[-1] = min(begin, spans[-1][0]), max(end, spans[-1][1])
        else:
            spans.append((begin, end))
    return spans
