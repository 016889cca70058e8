"""What the C library's allocator does with freed memory: pages that are mapped again, counted by the kernel."""

import platform
import subprocess
import sys

import pytest

#: A step that takes 64 MB in blocks of 8 MB and frees them; printed are the page faults of ten after the first.
STEPS = """
import resource
from wantrain.util import allocator
print(allocator.keep_freed_memory() if {keep} else None)
def step():
    blocks = [bytearray(8 << 20) for _ in range(8)]
    blocks[0][0] = 1
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these options")


def run(keep: bool, monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[str, int]:
    """What keep_freed_memory returns in a new process, and the page faults of its steps."""
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = subprocess.run(
        [sys.executable, "-c", STEPS.format(keep=keep)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    answer, faults = output.split()
    return answer, int(faults)


def test_freed_memory_is_kept(monkeypatch):
    pages = 10 * (64 << 20) // 4096  # what the ten steps take
    answer, faults = run(True, monkeypatch)
    assert (answer, faults < pages / 50) == ("True", True), faults
    _, without = run(False, monkeypatch)
    assert without > pages / 2, without  # or the option would not be needed


def test_environment_comes_first(monkeypatch):
    answer, _ = run(True, monkeypatch, MALLOC_TRIM_THRESHOLD_="131072")
    assert answer == "False"
