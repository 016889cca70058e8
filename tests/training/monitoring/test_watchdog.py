"""The watchdog lets long work go on as long as it advances, and ends what stands still with a word and its own code."""

import hashlib
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from wantrain.batch import Batch
from wantrain.models.formats import base, weights
from wantrain.sampling.generate import Experts, Texts, generate
from wantrain.training.engine.engine import Stepper
from wantrain.training.monitoring import deadline
from wantrain.training.monitoring.watchdog import HUNG, Watchdog
from wantrain.training.validation.measure import over_ranks
from wantrain.util import progress
from wantrain.util.distributed import DataRanks
from wantrain.util.files import file_hash
from wantrain.util.progress import listening

ROOT = Path(__file__).resolve().parent.parent.parent.parent
#: Holds the interpreter: PyDLL calls C without giving it back.
HELD = "import ctypes; ctypes.PyDLL(None).sleep(60)"

WATCHED = """
import sys, time, threading
sys.path.insert(0, {root!r})
from wantrain.training.monitoring import deadline, watchdog
from wantrain.util.progress import report_progress
{before}
with watchdog.Watchdog(1.0) as watched:
    for _ in range(4):
        time.sleep(0.5)
        report_progress("working")
    report_progress("work of 100 % weight")
    print("beaten", flush=True)
    {work}
print("left", flush=True)
{after}
"""


def run(work="pass", *, before="", after=""):
    script = WATCHED.format(root=str(ROOT), work=work, before=before, after=after)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("work", ["time.sleep(60)", HELD], ids=["gives the interpreter back", "holds it"])
def test_hanging_process(work):
    """A process that makes no progress ends with a message, every stack and exit code 75."""
    began = time.monotonic()
    ended = run(work)
    assert time.monotonic() - began < 60, "on a busy machine, with the imports"
    assert ended.returncode == HUNG == 75 and "beaten" in ended.stdout and "left" not in ended.stdout
    assert "error: nothing has happened for 1 s (safeguards.hang) while work of 100 % weight" in ended.stderr
    assert "exit code 75. The same command goes on from the last checkpoint" in ended.stderr
    stacks = ended.stderr.partition("error: nothing")[2]
    assert "most recent call first" in stacks and 'File "<string>"' in stacks, "the stacks follow what is said"
    assert ended.stderr.count("error: nothing") == 1


def test_hang_without_timers():
    """Without the system's timers, a process that holds the interpreter still ends."""
    ended = run(HELD, before="deadline._create = None; watchdog.GRACE = 1.5")
    assert ended.returncode == 1 and "most recent call first" in ended.stderr


@pytest.mark.slow
def test_slow_progress():
    """Work that reports progress is not ended, however long it takes, nor is what follows it.

    Another thread's progress counts, and progress after the end does not set the timers anew.
    """
    late = "watched.feed('late'); time.sleep(5.5)"
    ended = run(
        "threading.Thread(target=lambda: [(time.sleep(0.4), report_progress('beside')) for _ in range(8)]).start(); "
        "time.sleep(3.0); print('doing', watched.doing)",
        before="watchdog.GRACE = 1.5",
        after=f"time.sleep(1.5); {late}",
    )
    assert ended.returncode == 0 and ended.stdout.splitlines() == ["beaten", "doing work of 100 % weight", "left"]
    assert not ended.stderr


def test_watchdog_cleanup():
    """The watchdog leaves no thread, timer or listener behind."""
    before = threading.active_count()
    with Watchdog(60.0) as watched, Watchdog(None):
        assert len(watched.deadline._timers) == 2 and len(progress._listeners) == 1
    assert threading.active_count() == before and not watched.deadline._timers and not progress._listeners


def test_long_message():
    """A long message is cut to the buffer's size, and its percent signs stay escaped."""
    end = deadline.Deadline(0, sys.__stderr__)
    end.say("50 % of ä " + "%" * 2000)
    assert end._text.value.startswith("50 %% of ä %%%%".encode()) and end._text.value.count(b"%") % 2 == 0
    assert len(end._text.value) < deadline.ROOM
    end.close()


# What feeds it --------------------------------------------------------------------------------------------------------


def told(work):
    """What `work()` tells of its progress."""
    words = []
    with listening(words.append):
        work()
    return words


def test_validation_progress():
    """Every clip of a validation reports progress."""
    clip = Batch(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1), ("a",), (0,))
    stepper = SimpleNamespace(gather=lambda x: x, data_ranks=DataRanks())
    words = told(lambda: over_ranks([clip] * 3, lambda one: torch.zeros(2), stepper))
    assert words == [f"measuring clip {number} of 3" for number in (1, 2, 3)]


def test_hash_progress(tmp_path):
    """A file's hash reports progress for each piece, and is the SHA-256 of the whole."""
    file = tmp_path / "large"
    file.write_bytes(bytes(range(256)) * (5 << 12) + b"end")
    words = told(lambda: file_hash(file))
    assert len(words) >= 6 and set(words) == {f"hashing {file}"}, "one for each megabyte"
    assert file_hash(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(b"")
    assert file_hash(file) == hashlib.sha256(b"").hexdigest()


def test_tensor_progress(tmp_path):
    """Every tensor that is loaded, hashed, written or copied for a checkpoint reports progress."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    names = set(module.state_dict())
    words = told(lambda: weights.load_strict(module, dict(module.state_dict()), "here"))
    assert words[0] == "loading here" and set(words[1:]) == {f"loading here: {name}" for name in names}
    assert len(told(lambda: weights.fingerprint(module))) == len(names)
    words = told(lambda: weights.write_file(tmp_path / "a", module.state_dict()))
    assert words == [f"writing {tmp_path / 'a'}"] * (1 + len(names)), "header and each tensor"
    stepper = SimpleNamespace(engine="single", _copied=lambda tensor: tensor)
    words = told(lambda: [Stepper.whole(stepper, tensor) for tensor in module.state_dict().values()])
    assert len(words) == len(names) and words[0] == "copying a tensor of 6 elements for a checkpoint"


def test_solver_progress():
    """Every solver step reports progress."""
    still = lambda x, *_: torch.zeros_like(x)  # noqa: E731
    how = {"sigmas": torch.tensor([1.0, 0.5, 0.2, 0.0]), "guidance": {"dense": 1.0}, "solver": "euler"}
    text = torch.zeros(1, 1, 1)
    experts = Experts({"dense": still})
    words = told(lambda: generate(experts, latents=torch.zeros(1, 1, 1, 2, 2), texts=Texts(text, text), **how))
    assert words == [f"solver step {number} of 3" for number in (1, 2, 3)]


def test_download_progress(monkeypatch, tmp_path):
    """Every piece of a download reports progress, also where no bar is shown."""

    def snapshot(repository, *, tqdm_class, **how):
        bar = tqdm_class(total=10, disable=True)  # as the hub does where nobody looks
        for _ in range(3):
            bar.update(2)
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert told(lambda: base._fetch("a/b", None, ["vae"])) == ["downloading a/b"] * 4


# Whole runs -----------------------------------------------------------------------------------------------------------

#: train.py whose validation at step 0 sleeps at every clip, and at the last of six for ever.
SLOW = """
import itertools, runpy, sys, time
sys.path.insert(0, {root!r})
import matplotlib.pyplot  # on a busy machine an import alone takes seconds
from wantrain.training.validation.measure import Evaluator
calls, errors = itertools.count(1), Evaluator._errors
def slow(self, clip):
    time.sleep(1000 if next(calls) == 6 else 2.2)
    return errors(self, clip)
Evaluator._errors = slow
sys.argv[0] = {root!r} + "/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HANG = 10  # seconds, less than the 11 that the first five clips sleep


def test_hang_in_validation(tiny, tmp_path, environment, python):
    """A validation longer than the limit is not ended, and a clip that hangs is."""
    watched = ("data.holdout=0.3", "validation.every=1", "validation.clips=3", "validation.points=2")
    size = ("init=scratch", "batch_size=2", "steps=1", "check_expert=off", "run=r", f"safeguards.hang={HANG}")
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=str(ROOT)))
    command = [python, str(script), *tiny.train, *watched, *size]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == HUNG, ended.stderr
    assert f"error: nothing has happened for {HANG} s (safeguards.hang) while measuring clip 6 of 6" in ended.stderr
    assert "in over_ranks" in ended.stderr, "the stack of the clip"
