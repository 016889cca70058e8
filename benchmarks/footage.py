"""Reading clips of video files beside decord2 and PyAV alone: python benchmarks/footage.py [--rounds 7]

H.264 at 1280x720, 24 frames/s, crf 23, a keyframe every 250, with moving figures and noise: files of 10, 20 and 60 s.
Of each, clips of 81 frames at eight random places, drawn once and the same for every side, each asked for by itself
with the file opened anew; and all clips of the file of 20 s in one go, which is what encode.py asks for. `decord2` asks
for the frames by number (it seeks); `PyAV` seeks to the keyframe before and decodes on. Ours opens the file twice,
looks for the frames by timestamp, seeks to marks that shard.py has tried, and looks at where it has landed
(wantrain/data/footage/reader.py); they are found before timing, as shard.py finds them. The sides take turns,
each round another one first. Reported is how many CPU seconds decord2 takes for each of ours, clips of a task summed,
the median of the rounds. The goal, set with this protocol and before its first run: 0.95 or more over all random clips
together. All frames of all sides are compared with PyAV's of the same number.

Then decoding in 1 and 2 processes that can be killed, as encode.py does it: CPU seconds of all processes per frame.
Writes footage.json.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import resource
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
import result

from wantrain.data.footage.clips import Window
from wantrain.data.footage.decode_workers import Decoders, Job
from wantrain.data.footage.duplicates import thumbnail
from wantrain.data.footage.probe import ReadOptions, probe, read_whole, read_windows
from wantrain.data.footage.reader import Reader, SeekPoint
from wantrain.util.files import write_json
from wantrain.video import Frames

RATE, LENGTH, SIZE = 24, 81, (480, 832)
#: Seconds that the files last, and the places in each.
FILES, PLACES = (10, 20, 60), 8
#: Goal for decord2's CPU seconds over ours.
GOAL = 0.95
Read = Callable[[Path, list[int], list[SeekPoint]], Iterator[Frames]]


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


def ours(path: Path, starts: list[int], marks: list[SeekPoint]) -> Iterator[Frames]:
    return read_windows(
        path, probe(path), [Window(start / RATE, LENGTH) for start in starts], RATE, options=ReadOptions(marks)
    )


def with_decord(path: Path, starts: list[int], _: list[SeekPoint]) -> Iterator[Frames]:
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    for start in starts:
        yield reader.get_batch(list(range(start, start + LENGTH))).asnumpy()


def with_av(path: Path, starts: list[int], _: list[SeekPoint]) -> Iterator[Frames]:
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


def marks_of(path: Path) -> list[SeekPoint]:
    """What shard.py finds when it reads a file from end to end."""
    thumbnails = np.stack([thumbnail(frame) for frame in read_whole(path, probe(path))])
    return [mark for mark in Reader(path, len(thumbnails)).tried_seek_points(thumbnails) if mark is not None]


def agree(path: Path, starts: list[int], marks: list[SeekPoint]) -> None:
    """Every side gives the frames of the same numbers: nearer to PyAV's than to the ones beside them."""
    for start in starts:
        clips = {side: next(read(path, [start], marks)) for side, read in SIDES.items()}
        reference = clips["PyAV"][:, ::8, ::8].astype(np.int16)
        for side in ("wantrain", "decord2"):
            mine = clips[side][:, ::8, ::8].astype(np.int16)
            same = np.abs(mine - reference).mean((1, 2, 3))
            beside = np.abs(mine[1:] - reference[:-1]).mean((1, 2, 3))
            assert same.max() < 2 < beside.min(), f"{side} gives other frames of {path.name}"


def places(seconds: int) -> list[int]:
    """Where the random clips of a file begin, in frames."""
    draw = random.Random(seconds)
    return [draw.randrange(seconds * RATE - LENGTH) for _ in range(PLACES)]


def speeds(folder: Path, marks: dict[int, list[SeekPoint]], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """CPU seconds of each side and task, decord2's over ours; and PyAV's."""
    asked = {f"random clips of {seconds} s": (seconds, [[place] for place in places(seconds)]) for seconds in FILES}
    asked["all clips of 20 s"] = 20, [list(range(0, 20 * RATE - LENGTH, LENGTH))]
    taken: dict[str, dict[str, list[float]]] = {task: {side: [] for side in SIDES} for task in asked}
    order = list(SIDES)
    for _ in range(rounds):
        for task, (seconds, requests) in asked.items():
            for side in order:
                began = time.process_time()
                for starts in requests:
                    for _ in SIDES[side](folder / f"{seconds}.mp4", starts, marks[seconds]):
                        pass
                taken[task][side].append(time.process_time() - began)
        order = [*order[1:], order[0]]
    random_ones = [each for task, each in taken.items() if task.startswith("random")]
    taken["all random clips"] = {
        side: [sum(parts) for parts in zip(*(each[side] for each in random_ones), strict=True)] for side in SIDES
    }
    cases = {}
    for task, each in taken.items():
        sides = {side: each[side] for side in ("decord2", "wantrain")}
        goal = GOAL if task == "all random clips" else None
        cases[task] = result.case({"CPU seconds": result.measure("CPU s", sides, at_least=goal)})
    return cases, {"CPU seconds of PyAV": {task: each["PyAV"] for task, each in taken.items()}}


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
    sides = {f"{workers} process{'es' if workers > 1 else ''}": seconds[workers] for workers in (2, 1)}
    return result.case({"CPU seconds per frame": result.measure("CPU s", sides, at_most=1.1)})


def cpu_seconds() -> float:
    """Of this process, and of its children that have ended."""
    return sum(
        resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def main() -> None:
    """Write the videos, compare the frames, measure, store."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=7)
    asked.add_argument("--folder", type=Path, help="where the videos are, or are to be kept")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        marks = {}
        for seconds in FILES:
            path = folder / f"{seconds}.mp4"
            if not path.is_file():
                write(path, seconds, seed=seconds)
            marks[seconds] = marks_of(path)
            agree(path, places(seconds), marks[seconds])
        cases, more = speeds(folder, marks, given.rounds)
        cases["decoding in processes"] = in_processes(folder, given.rounds)
        places_of = {seconds: [mark.number for mark in each] for seconds, each in marks.items()}
    found = result.record(
        __file__,
        protocol="one process, sides in turn, each round another one first; every frame compared with PyAV's",
        shapes={"frames": LENGTH, "size": [720, 1280], "rate": RATE, "keyframe_every": 250, "marks": places_of},
        cases=cases,
        libraries=("decord2", "av", "numpy"),
        more=more,
    )
    write_json(Path(__file__).with_suffix(".json"), found)
    print("\n".join(result.shown(found)))


if __name__ == "__main__":
    main()
