"""encode.py as several processes, killed at any moment: what is left in the end is what one unbroken run writes."""

import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from preloaded import forked

from wantrain.data import check_folder, read_manifest
from wantrain.data.latents import heartbeat
from wantrain.data.latents.heartbeat import Heartbeat
from wantrain.data.latents.index import Index
from wantrain.demo.footage import make_footage

ENCODE = Path(__file__).resolve().parents[3] / "encode.py"


def contents(folder):
    """Hashes of all files but hidden ones, which are notes for the next run."""
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture
def long_set(inside, tmp_path):
    """Footage that takes two processes some seconds to encode."""
    make_footage(tmp_path / "footage", num_videos=24, num_images=4, size=64)
    inside(tmp_path, "shard.py", "source=footage", "out=videos", "num_frames=17", "report=none")
    return tmp_path / "videos"


class Encoding:
    """encode.py as two processes of one launch, each with its rank in the environment."""

    def __init__(self, command, out, environment, python):
        self.out, self.began, self.python = out, time.time(), python
        self.processes = [
            subprocess.Popen(
                [python, str(ENCODE), *command, f"out={out}"],
                env={**environment, "RANK": str(rank), "WORLD_SIZE": "2"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            for rank in range(2)
        ]

    def wait_for_work(self, tars):
        """Until both have begun and so many tars are there; False if they have ended before."""
        notes = [self.out / f".rank-{rank}.json" for rank in range(2)]
        while (
            not all(note.exists() and note.stat().st_mtime >= self.began for note in notes)
            or len(list(self.out.glob("*.tar"))) < tars
        ):
            if any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.01)
        return True

    def kill(self):
        """kill -9 of both, their decoders included."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its decoders with it
                os.killpg(forked(self.python, process.pid), signal.SIGKILL)
        for process in self.processes:
            process.wait()


def agrees(out, unbroken):
    """The folder is the unbroken run's, byte for byte; and in itself no sample is there twice or missing."""
    assert contents(out) == contents(unbroken)
    assert not [path.name for path in out.iterdir() if path.name.endswith(".tmp")]
    manifest = read_manifest(out, "latent")
    check_folder(out)
    index, names = Index.read(out / manifest["files"][0]["name"]), Counter()
    for tar_file in manifest["shards"]:
        with tarfile.open(out / tar_file["name"]) as tar:
            names.update(name.removesuffix(".safetensors") for name in tar.getnames() if name.endswith(".safetensors"))
    assert names == Counter(index.name(window) for window in range(len(index.shard)))
    assert set(names.values()) == {1} and len(names) == manifest["clips"]


def choices(videos, base, area):
    return [f"shards={videos}", f"weights={base}", f"area={area}", "shard_clips=2", "decode.workers=1", "report=none"]


def killed(kills, command, out, unbroken, environment, python, seed=0):
    """Kill two processes so many times, a moment after a number of tars that is drawn; the tars that each kill left.

    The next begins with them; a folder that is finished before its kill is thrown away.
    """
    draw, left = random.Random(seed), []
    moments = sorted(draw.sample(range(len(list(unbroken.glob("*.tar"))) - 2), kills))
    while len(left) < kills:
        encoding = Encoding(command, out, environment, python)
        try:
            if encoding.wait_for_work(moments[len(left)]):
                time.sleep(draw.uniform(0, 0.1))
        finally:
            encoding.kill()
        if (out / "manifest.json").exists():
            agrees(out, unbroken)
            shutil.rmtree(out)  # it was too late
        else:
            left.append(len(list(out.glob("*.tar"))))
    return left


def test_launch_and_kill(tiny, environment, python, launch, call, tmp_path):
    """A launch shares the work between its ranks, and one process completes what two killed ones left.

    The launch has no process group: each rank prints what it has made; a killed rank leaves no trace.
    """
    unbroken, out = tmp_path / "unbroken", tmp_path / "out"
    command = choices(tiny.videos, tiny.base, 1024)
    ended = launch("ddp", *command, f"out={unbroken}", script=ENCODE)
    made = {rank: int(clips) for rank, clips in re.findall(r"rank (\d) of 2: (\d+) clips", ended.stdout)}
    assert set(made) == {"0", "1"} and all(made.values())
    assert sum(made.values()) == read_manifest(unbroken, "latent")["clips"]
    killed(1, command, out, unbroken, environment, python)
    call("encode.py", *command, f"out={out}")
    agrees(out, unbroken)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_kills(tiny, long_set, call, environment, python, tmp_path):
    """Two processes, killed at twenty random moments in five runs, end with the bytes of an unbroken run."""
    unbroken, command, tars = tmp_path / "unbroken", choices(long_set, tiny.base, 4096), list[int]()
    call("encode.py", *command, f"out={unbroken}")
    for life in range(5):
        out = tmp_path / f"out-{life}"
        tars += killed(4, command, out, unbroken, environment, python, seed=life)
        ended = Encoding(command, out, environment, python)
        assert [process.wait(timeout=120) for process in ended.processes] == [0, 0]
        agrees(out, unbroken)
    print(f"tars there after each kill: {tars}")
    assert len(set(tars)) > 5, "the moments were not spread over the work"


# ------------------------------------------------------------------------------------------- a rank that is lost


@pytest.fixture
def two(monkeypatch, tmp_path):
    """attend(rank, state): what that rank of two says."""

    def attend(rank, state, plan="plan"):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        present = Heartbeat(tmp_path, plan, timeout=0.3)
        if state is not None:
            present.send(state, now=True)
        return present

    monkeypatch.setattr(heartbeat, "GRACE", 0.2)
    return attend


def test_rank_0_wait(two):
    """Rank 0 waits until the others are done."""
    two(1, "encoding")
    first = two(0, "begun")
    waiting = threading.Thread(target=first.wait)
    waiting.start()
    waiting.join(0.15)
    assert waiting.is_alive()
    two(1, "done")
    waiting.join(5)
    assert not waiting.is_alive()


@pytest.mark.parametrize(
    ("state", "plan", "message"),
    [
        ("encoding", "plan", "rank 1 of 2 has given no sign of life for 0.3 s (its last state: encoding)"),
        (None, "plan", "(its last state: none)"),
        ("done", "another plan", "(its last state: none)"),
        ("failed: no space", "plan", "rank 1 of 2 failed: no space"),
    ],
)
def test_lost_rank(two, state, plan, message):
    """The error names a rank that is silent or has failed."""
    two(1, state, plan)
    with pytest.raises(ValueError, match=re.escape(message)):
        two(0, "begun").wait()


def test_clock_skew(two, monkeypatch):
    """Clocks that differ between ranks change nothing.

    A rank whose clock is a day behind, and goes back meanwhile, is heard all the same.
    """
    monkeypatch.setattr(time, "time", lambda: 1e9)
    two(1, "encoding")
    first = two(0, "begun")
    waiting = threading.Thread(target=first.wait)
    waiting.start()
    for turn in range(6):  # longer in all than any timeout
        time.sleep(0.1)
        monkeypatch.setattr(time, "time", lambda turn=turn: 1e9 - 86400 * turn)
        two(1, f"encoding {turn}")
        assert waiting.is_alive()
    two(1, "done")
    waiting.join(5)
    assert not waiting.is_alive()
