"""What a file's header says that changes how its frames must be shown, and that decord does not tell.

Read by the ffmpeg that imageio brings. Numbers of frames and lengths are not read here: headers lie about those.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

#: Transfer functions of high dynamic range: shown as they are, their pictures are grey and dull.
HDR = ("smpte2084", "arib-std-b67")
#: Seconds after which a header is given up.
TIMEOUT = 30


@dataclass(frozen=True)
class Header:
    """transfer: how light is written, as ffmpeg names it, empty if unknown. aspect: width / height of one pixel."""

    transfer: str = ""
    aspect: tuple[int, int] = (1, 1)


def read_header(path: Path) -> Header:
    """The first video stream's header; an empty one where ffmpeg finds none, or is not there."""
    try:
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
        # -nostdin: it would read the terminal.
        ended = subprocess.run(
            [ffmpeg, "-nostdin", "-hide_banner", "-i", f"file:{path}"], capture_output=True, timeout=TIMEOUT
        )
    except (OSError, RuntimeError, subprocess.TimeoutExpired):
        return Header()
    return parse(ended.stderr.decode("utf-8", "replace"))


def parse(said: str) -> Header:
    """What ffmpeg prints about a file, read."""
    lines = (line for line in said.splitlines() if re.match(r"\s*Stream #.*: Video: ", line))
    line = next((line for line in lines if "(attached pic)" not in line), "")
    transfer = next((name for name in HDR if name in line), "")
    sar = re.search(r"\bSAR (\d+):(\d+)", line)
    aspect = (int(sar[1]), int(sar[2])) if sar and int(sar[1]) and int(sar[2]) else (1, 1)
    return Header(transfer, aspect)


def refuse(header: Header, name: str) -> None:
    """ValueError, with the command that fixes it, if frames would not look as a player shows them."""
    stem = Path(name).stem
    if header.transfer in HDR:
        chain = "zscale=t=linear:npl=100,tonemap=hable,zscale=t=bt709:m=bt709:p=bt709,format=yuv420p"
        raise ValueError(
            f"is HDR ({header.transfer}), which shown without tone mapping is dull and grey; "
            f"ffmpeg -i {name} -vf {chain} {stem}_sdr.mp4"
        )
    width, height = header.aspect
    if abs(width / height - 1) > 0.02:
        raise ValueError(
            f"its pixels are not square ({width}:{height}), so that it would be squeezed; "
            f"ffmpeg -i {name} -vf scale=iw*sar:ih,setsar=1 {stem}_square.mp4"
        )
