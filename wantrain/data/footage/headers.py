"""Colour transfer and pixel aspect of a video, which decord does not report, from the ffmpeg that imageio brings.

Frame counts and durations are not read here: headers are unreliable about those.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

#: Transfer functions of high dynamic range. Without tone mapping such frames look grey and dull.
HDR = ("smpte2084", "arib-std-b67")
#: Seconds that ffmpeg may take to read a header.
TIMEOUT = 30


@dataclass(frozen=True)
class Header:
    """Facts of the first video stream.

    transfer  transfer function as ffmpeg names it; empty if unknown or not HDR
    aspect    (width, height) of one pixel
    """

    transfer: str = ""
    aspect: tuple[int, int] = (1, 1)


def read_header(path: Path) -> Header:
    """Read the first video stream's header; an empty header where ffmpeg finds no stream or is not installed."""
    try:
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
        # -nostdin: ffmpeg would read the terminal.
        process = subprocess.run(
            [ffmpeg, "-nostdin", "-hide_banner", "-i", f"file:{path}"], capture_output=True, timeout=TIMEOUT
        )
    except (OSError, RuntimeError, subprocess.TimeoutExpired):
        return Header()
    return parse(process.stderr.decode("utf-8", "replace"))


def parse(output: str) -> Header:
    """Parse what ffmpeg prints about a file."""
    lines = (line for line in output.splitlines() if re.match(r"\s*Stream #.*: Video: ", line))
    line = next((line for line in lines if "(attached pic)" not in line), "")
    transfer = next((name for name in HDR if name in line), "")
    sar = re.search(r"\bSAR (\d+):(\d+)", line)
    aspect = (int(sar[1]), int(sar[2])) if sar and int(sar[1]) and int(sar[2]) else (1, 1)
    return Header(transfer, aspect)


def refuse(header: Header, name: str) -> None:
    """Raise ValueError, with the ffmpeg command that fixes it, for HDR video and for pixels that are not square."""
    stem = Path(name).stem
    if header.transfer in HDR:
        chain = "zscale=t=linear:npl=100,tonemap=hable,zscale=t=bt709:m=bt709:p=bt709,format=yuv420p"
        raise ValueError(
            f"is HDR ({header.transfer}), which looks dull and grey without tone mapping; convert it: "
            f"ffmpeg -i {name} -vf {chain} {stem}_sdr.mp4"
        )
    width, height = header.aspect
    if abs(width / height - 1) > 0.02:
        raise ValueError(
            f"its pixels are not square ({width}:{height}), so frames would look squeezed; convert it: "
            f"ffmpeg -i {name} -vf scale=iw*sar:ih,setsar=1 {stem}_square.mp4"
        )


def interlaced(name: str) -> str:
    """The reason for rejecting an interlaced file, with the ffmpeg command that converts it."""
    own, other = shlex.quote(name), shlex.quote(f"{Path(name).stem}_progressive.mp4")
    return (
        "is interlaced, so that edges look like combs where something moves; convert it: "
        f"ffmpeg -i {own} -vf bwdif=mode=send_frame -c:a copy {other}, or give interlaced=deinterlace"
    )
