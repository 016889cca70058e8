"""Reading clips of video files beside decord2 and PyAV alone: python benchmarks/footage.py [--rounds 3]

H.264 at 1280x720, 24 frames/s, crf 23, a keyframe every 250, with moving figures and noise. Three tasks: a clip of 81
frames at a random place of a file of 10 s; the same of a file of 20 s; and all clips of that file, which is what
encode.py asks for. `decord2` opens the file and asks for the frames by number (it seeks); `PyAV` seeks to the keyframe
before and decodes on. Ours opens, looks for the frames by timestamp and reads forwards from the first frame (skipping
between keyframes), because decord2 gives other frames after a seek in files with an edit list or open groups of
pictures (docs/log.md). Reported are clips per CPU second, turn by turn, medians; memory is touched before each turn.
All frames of all sides are compared with PyAV's of the same number.

Then decoding in 1 and 2 processes that can be killed, as encode.py does it: CPU seconds of all processes per frame.
Writes footage.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import platform
import random
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import decord
import imageio_ffmpeg
import numpy as np

from wantrain.data.decoding import Decoders, Job
from wantrain.data.footage import probe, read_windows
from wantrain.data.windows import Window
from wantrain.video import Frames

RATE, LENGTH, SIZE = 24, 81, (480, 832)
WARM_BYTES = 3 << 30
Read = Callable[[Path, list[int]], Iterator[Frames]]


def warm_up() -> None:
    """Touch as much memory as a task needs and give it back: on a virtual machine pages that lay free for seconds cost
    several times as much to touch, so that the turn would decide.
    """
    memory = mmap.mmap(-1, WARM_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(memory, dtype=np.uint8).fill(1)


def write(path: Path, seconds: int, seed: int) -> None:
    """A video in which every frame is another picture."""
    picture = f"testsrc2=size=1280x720:rate={RATE}:duration={seconds},noise=alls=10:allf=t:all_seed={seed}"
    subprocess.run(
        [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", picture),
            *("-c:v", "libx264", "-preset", "veryfast", "-crf", "23", "-g", "250", "-pix_fmt", "yuv420p", path),
        ],
        check=True,
    )


def ours(path: Path, starts: list[int]) -> Iterator[Frames]:
    return read_windows(path, probe(path), [Window(start / RATE, LENGTH) for start in starts], RATE)


def with_decord(path: Path, starts: list[int]) -> Iterator[Frames]:
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    for start in starts:
        yield reader.get_batch(list(range(start, start + LENGTH))).asnumpy()


def with_av(path: Path, starts: list[int]) -> Iterator[Frames]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        assert stream.time_base is not None
        for start in starts:
            container.seek(round(start / RATE / stream.time_base), stream=stream)
            frames: list[Any] = []
            for frame in container.decode(stream):
                assert frame.pts is not None
                if round(frame.pts * stream.time_base * RATE) >= start:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == LENGTH:
                    break
            yield np.stack(frames)


SIDES: dict[str, Read] = {"wantrain": ours, "decord2": with_decord, "PyAV": with_av}


def agree(path: Path, starts: list[int]) -> None:
    """Every side gives the frames of the same numbers: nearer to PyAV's than to the ones beside them."""
    clips = {side: list(read(path, starts)) for side, read in SIDES.items()}
    for number, right in enumerate(clips["PyAV"]):
        reference = right[:, ::8, ::8].astype(np.int16)
        for side in ("wantrain", "decord2"):
            mine = clips[side][number][:, ::8, ::8].astype(np.int16)
            same = np.abs(mine - reference).mean((1, 2, 3))
            beside = np.abs(mine[1:] - reference[:-1]).mean((1, 2, 3))
            assert same.max() < 2 < beside.min(), f"{side} gives other frames of {path.name}"


def tasks(folder: Path, draw: random.Random) -> dict[str, tuple[Path, list[list[int]]]]:
    """By name: the file, and the clips that are asked for in one go."""
    short, long = folder / "10.mp4", folder / "20.mp4"
    return {
        "random clip of 10 s": (short, [[draw.randrange(10 * RATE - LENGTH)] for _ in range(2)]),
        "random clip of 20 s": (long, [[draw.randrange(20 * RATE - LENGTH)]]),
        "all clips of 20 s": (long, [list(range(0, 20 * RATE - LENGTH, LENGTH))]),
    }


def speeds(folder: Path, rounds: int) -> dict[str, Any]:
    """Clips per CPU second of each side and task."""
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for task, (path, asked) in tasks(folder, random.Random(number)).items():
            rates = found.setdefault(task, {side: [] for side in SIDES})
            for side in list(SIDES) if number % 2 else reversed(SIDES):
                warm_up()
                began = time.process_time()
                clips = sum(1 for starts in asked for _ in SIDES[side](path, starts))
                rates[side].append(clips / (time.process_time() - began))
    result = {}
    for task, rates in found.items():
        median = {side: statistics.median(each) for side, each in rates.items()}
        ratios = [mine / other for mine, other in zip(rates["wantrain"], rates["decord2"], strict=True)]
        result[task] = {
            "clips_per_cpu_second": {side: round(each, 2) for side, each in median.items()},
            "ratio_to_decord2": round(statistics.median(ratios), 3),
            "spread": [round(each, 3) for each in sorted(ratios)],
        }
    return result


def read_job(request: dict[str, Any]) -> Iterator[Frames]:
    """What a decoder process does here."""
    path = Path(request["path"])
    yield from read_windows(path, probe(path), [Window(**window) for window in request["windows"]], RATE, SIZE)


def in_processes(folder: Path, rounds: int) -> dict[str, Any]:
    """CPU seconds per frame with 1 and 2 decoder processes, and whether both give the same bytes."""
    windows = [{"start": start / RATE, "num_frames": LENGTH} for start in (0, LENGTH)]
    jobs = [Job({"path": str(folder / "10.mp4"), "windows": windows}) for _ in range(2)]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    digests = set()
    for number in range(rounds):
        for workers in (1, 2) if number % 2 else (2, 1):
            digest, frames, began = hashlib.sha256(), 0, cpu_seconds()
            with Decoders(read_job, workers=workers, timeout=600) as decoders:
                for item in decoders.decode(jobs):
                    assert item.frames is not None, item.reason
                    digest.update(item.frames.data)
                    frames += len(item.frames)
            seconds[workers].append((cpu_seconds() - began) / frames)
            digests.add(digest.hexdigest())
    assert len(digests) == 1, "the bytes depend on the number of processes"
    ratios = [two / one for one, two in zip(seconds[1], seconds[2], strict=True)]
    return {
        "cpu_seconds_per_frame": {workers: round(statistics.median(each), 5) for workers, each in seconds.items()},
        "ratio_2_to_1": round(statistics.median(ratios), 3),
        "spread": [round(each, 3) for each in sorted(ratios)],
    }


def cpu_seconds() -> float:
    """Of this process, and of its children that have ended."""
    return sum(
        resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def main() -> None:
    """Write the videos, compare the frames, measure, store."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--folder", type=Path, help="where the videos are, or are to be kept")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        for seconds in (10, 20):
            if not (folder / f"{seconds}.mp4").is_file():
                write(folder / f"{seconds}.mp4", seconds, seed=seconds)
        for path, wanted in tasks(folder, random.Random(0)).values():
            agree(path, wanted[0][:2])
        result = {"reading": speeds(folder, given.rounds), "processes": in_processes(folder, given.rounds)}
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "shape": {"frames": LENGTH, "size": [720, 1280], "rate": RATE, "keyframe_every": 250},
        "versions": {"decord2": decord.__version__, "av": av.__version__, "numpy": np.__version__},
        "machine": f"{platform.machine()}, 2 cores",
        "command": f"python benchmarks/footage.py --rounds {given.rounds}",
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps({**about, **result}, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
