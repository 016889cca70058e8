"""What the system does to a program: a disk that refuses, Ctrl-C, a reader of the output that goes away."""

import errno
import io
import os
import resource
import signal
import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed import TCPStore

from wantrain.util import console, devices, distributed
from wantrain.util.console import FIXES, disk_error, errors_to_exit_code, exit_code
from wantrain.util.files import check_writable, claim_folder, naming, write_atomically


def ended(error, capsys):
    """Exit code and stderr of a program that raises `error`."""
    with pytest.raises(SystemExit) as stopped, errors_to_exit_code():
        raise error
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize("number", sorted(FIXES))
def test_disk_error_line(number, capsys):
    """What a disk refuses is one line with the file, the system's words and a fix."""
    code, said = ended(OSError(number, os.strerror(number), "out/clip.mp4"), capsys)
    assert code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: out/clip.mp4: {os.strerror(number)}; {FIXES[number]}. ")


def test_disk_error_of_library(capsys):
    """An error of safetensors, which is no OSError, is recognised by the number in its text."""
    code, said = ended(SafetensorError("I/O error: No space left on device (os error 28)"), capsys)
    assert code == 2 and "No space left on device" in said and FIXES[errno.ENOSPC] in said


def test_vanished_folder(tmp_path, capsys):
    """A folder that vanishes in the middle of the work is named."""
    gone = tmp_path / "gone"
    with pytest.raises(SystemExit) as stopped, errors_to_exit_code():
        write_atomically(gone / "state.json", "{}")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and str(gone) in said and "check the path, and that the disk is mounted" in said


def test_other_errors_are_bugs():
    """Errors of connections and of the program keep their traceback."""
    for error in (ConnectionError("reset"), KeyError("x"), OSError(errno.ECHILD, "no child"), RuntimeError("os error")):
        with pytest.raises(type(error)), errors_to_exit_code():
            raise error
        assert exit_code(error) == 1


def test_exit_codes():
    """The exit code of a program by the error that ends it."""
    full = OSError(errno.ENOSPC, "full")
    found = [
        exit_code(error) for error in (ValueError("x"), full, KeyboardInterrupt(), SystemExit(3), SystemExit(None))
    ]
    assert found == [2, 2, 130, 3, 1]


def test_ctrl_c_is_one_line(capsys):
    """Ctrl-C is one line and the exit code of shells."""
    code, said = ended(KeyboardInterrupt(), capsys)
    assert code == 130 and said.count("\n") == 1 and "Ctrl-C" in said


def open_stream(path):
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(path, "w")), encoding="utf-8")


@pytest.mark.parametrize("what", ["pipe without a reader", "full disk"])
def test_output_is_dropped(what):
    """Writing to a stream that the system refuses raises nothing, again and again."""
    if what == "full disk":
        stream = open_stream("/dev/full")
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = open_stream(writer)
    kept = console._keeping(stream)
    for _ in range(3):
        print("x" * 100_000, file=kept, flush=True)
    with mock.patch.object(os, "dup2") as replaced:
        print("x", file=kept, flush=True)
    assert not replaced.called, "a reader that is gone is asked once, a full disk may have room later"


def test_output_still_arrives(tmp_path):
    """A stream that works is written as before, line by line where it was."""
    stream = open_stream(tmp_path / "log")
    kept = console._keeping(stream)
    print("é", file=kept, flush=True)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "é\n"


def test_other_streams_stay(capsys):
    """The streams of a test or a notebook are not replaced."""
    before = sys.stdout, sys.stderr
    console.keep_streams()
    assert (sys.stdout, sys.stderr) == before


def test_named_error(tmp_path):
    """An error of a write has the name of its file; one that has a name keeps it."""
    with pytest.raises(OSError) as error, naming(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert disk_error(error.value).startswith(f"{tmp_path}/a: No space left on device; ")
    with pytest.raises(OSError) as error, naming(tmp_path / "a"):
        raise OSError(errno.EACCES, "Permission denied", "b")
    assert error.value.filename == "b"


@pytest.mark.parametrize("place", ["open", "fsync", "replace"])
def test_refused_write_leaves_nothing(place, tmp_path, monkeypatch):
    """Where the disk refuses a small file, the old one stays and no partial one is left."""
    path, full = tmp_path / "state.json", OSError(errno.ENOSPC, "No space left on device")
    path.write_text("old")
    owner, name = {"open": (Path, "open"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[place]
    with mock.patch.object(owner, name, side_effect=full), pytest.raises(OSError) as error:
        write_atomically(path, "new")
    assert error.value.filename == str(path)
    assert [each.name for each in tmp_path.iterdir()] == ["state.json"] and path.read_text() == "old"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_unwritable_folder(number, tmp_path):
    """A folder that takes nothing is refused before any work, with the nearest folder that there is."""
    refusing = mock.patch("tempfile.TemporaryFile", side_effect=OSError(number, os.strerror(number)))
    with refusing, pytest.raises(ValueError) as error:
        check_writable(tmp_path / "new" / "deeper", key="out")
    assert str(error.value) == (
        f"out={tmp_path}/new/deeper cannot be written ({tmp_path} is the nearest folder that there is): "
        f"{os.strerror(number)}; {FIXES[number]}"
    )
    with refusing, pytest.raises(ValueError, match=r"out=.* cannot be written: "):
        claim_folder(tmp_path / "new", sentinel=None, key="out")


def test_writable_folder(tmp_path):
    """A folder that can be written is left as it is; a file in the way and /proc are refused."""
    check_writable(tmp_path / "new", key="out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file" / "deeper", Path("/proc/nowhere")):
        with pytest.raises(ValueError, match=rf"out={wrong} cannot be written"):
            check_writable(wrong, key="out")


def test_device_line(tmp_path):
    """The line about a CPU has its threads and memory; a container's limit counts where it is lower."""
    line = devices.describe(torch.device("cpu"))
    threads = f"{torch.get_num_threads()} threads on"
    assert line.startswith("device: cpu ") and threads in line and " GiB free" in line
    total, free = devices.host_memory(tmp_path)
    assert 0 < free <= total
    groups = tmp_path / "sys/fs/cgroup"
    groups.mkdir(parents=True)
    (groups / "memory.max").write_text("1000000\n")
    (groups / "memory.current").write_text("400000\n")
    assert devices.host_memory(tmp_path) == (1_000_000, 600_000)
    (groups / "memory.max").write_text("max\n")
    assert devices.host_memory(tmp_path)[0] == total


def test_named_error_of_library(tmp_path):
    """safetensors' own error of a file that the system refuses becomes an OSError with its name; others stay."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError) as error, naming(tmp_path / "a"):
            save_file({"x": torch.zeros(1 << 20)}, tmp_path / ".a.tmp")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / "a")
    with pytest.raises(SafetensorError, match="damaged"), naming(tmp_path / "a"):
        raise SafetensorError("damaged")


def test_one_process_prints(monkeypatch, capsys):
    """Of two processes of a launch that meet one error, one prints it; another error is printed too."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(console.time, "sleep", lambda seconds: None)
    for key, value in {
        "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)

    def fail(message):
        with pytest.raises(SystemExit) as ended, errors_to_exit_code():
            raise ValueError(message)
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert [fail("a=1 is wrong"), fail("a=1 is wrong"), fail("b=2 is wrong")] == [
        "error: a=1 is wrong\n", "", "error: b=2 is wrong\n"
    ]  # fmt: skip
    # The launchers' store (launch/node.sh): it outlives a start, whose own port tells it from the one before.
    monkeypatch.setenv("WANTRAIN_STORE", f"127.0.0.1:{store.port}")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    for port in ("7", "8"):
        monkeypatch.setenv("MASTER_PORT", port)
        assert [fail("c=3 is wrong"), fail("c=3 is wrong")] == ["error: c=3 is wrong\n", ""]
    monkeypatch.delenv("WANTRAIN_STORE")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(distributed, "STORE_TIMEOUT", timedelta(seconds=1))
    del store
    monkeypatch.setenv("MASTER_PORT", "1")  # nobody answers
    assert fail("a=1 is wrong") == "error: a=1 is wrong\n"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert fail("a=1 is wrong") == "error: a=1 is wrong\n"
