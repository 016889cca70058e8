"""Prefetching: results come in order from a thread that runs ahead, and its errors and its end are seen."""

import itertools
import subprocess
import sys
import threading
import time

import pytest
import torch

from wantrain.batch import Batch
from wantrain.data.prefetch import prefetch


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_for_the_end():
    deadline = time.monotonic() + 5
    while prefetching() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetching()


def batch_of(number):
    """A batch that carries a number."""
    return Batch(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1), (str(number),), (number,))


def numbers(count):
    return (lambda number=number: batch_of(number) for number in range(count))


def test_order_and_depth():
    """Answers come in order from a thread that is ahead by `depth`."""
    asked = []

    def requests():
        for request in numbers(20):
            asked.append(request)
            yield request

    answers = prefetch(requests(), depth=3)
    assert next(answers).positions == (0,)
    deadline = time.monotonic() + 5
    while len(asked) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(asked) == 5  # one given, three waiting, one in hand
    assert [batch.positions[0] for batch in answers] == list(range(1, 20))
    wait_for_the_end()
    assert list(answers) == []


def until_waiting(answers):
    deadline, item = time.monotonic() + 5, None
    while item is None and time.monotonic() < deadline:
        item = answers.waiting()
    return item


def test_waiting():
    """What is there already is given without a wait; an error or the end comes when the next one is asked for."""
    goes_on = threading.Event()

    def slow():
        goes_on.wait(5)
        return batch_of(1)

    answers = prefetch(iter([lambda: batch_of(0), slow]))
    assert until_waiting(answers).positions == (0,)
    assert answers.waiting() is None
    goes_on.set()
    assert next(answers).positions == (1,)
    answers._thread.join(5)
    assert answers.waiting() is None and answers.waiting() is None and list(answers) == []

    def broken():
        raise ValueError("a bad clip")

    answers = prefetch(iter([broken]))
    answers._thread.join(5)
    assert answers.waiting() is None
    with pytest.raises(ValueError, match="a bad clip"):
        next(answers)
    wait_for_the_end()


def test_dead_thread(monkeypatch):
    """A thread that has ended without an answer raises an error instead of an endless wait."""
    answers = sys.modules["wantrain.data.prefetch"]
    monkeypatch.setattr(answers, "_answer", lambda requests, ready, stopped: ready.put(next(requests)()))
    answers = prefetch(numbers(5))
    assert next(answers).positions == (0,)
    with pytest.raises(ValueError, match="the thread that loads data has ended"):
        next(answers)


def test_error_order():
    """An error arrives at its place in the order."""

    def fail():
        raise ValueError("latent-000001.tar: damaged")

    answers = prefetch(itertools.chain(numbers(2), [fail], numbers(1)))
    assert [next(answers).positions, next(answers).positions] == [(0,), (1,)]
    with pytest.raises(ValueError, match="damaged"):
        next(answers)
    with pytest.raises(StopIteration):
        next(answers)
    wait_for_the_end()


def test_request_error():
    """An error of the iterator of requests arrives too."""

    def requests():
        yield from numbers(1)
        raise ValueError("no such step")

    answers = prefetch(requests())
    assert next(answers).positions == (0,)
    with pytest.raises(ValueError, match="no such step"):
        next(answers)


def test_thread_end():
    """The thread ends when its answers are closed or deleted."""
    answers = prefetch(numbers(1000))
    assert next(answers).positions == (0,)
    answers.close()
    assert not prefetching()
    with pytest.raises(StopIteration):
        next(answers)
    answers = prefetch(numbers(1000))
    assert next(answers).positions == (0,)
    del answers
    assert not prefetching()


@pytest.mark.parametrize(("end", "code"), [("", 0), ("sys.exit(143)", 143)])
def test_early_exit(end, code, python, environment):
    """A program can end in the middle of its answers.

    A thread that is inside torch while the interpreter is taken down would abort it: exit code -6.
    """
    program = (
        "import sys, torch\n"
        "from wantrain.batch import Batch\n"
        "from wantrain.data.prefetch import prefetch\n"
        "load = lambda: Batch(torch.randn(2000, 500).sort().values, torch.zeros(1), ('',), (0,))\n"
        f"answers = prefetch(load for _ in range(10**6))\nnext(answers)\n{end}"
    )
    result = subprocess.run([python, "-c", program], env=environment, timeout=60, capture_output=True, text=True)
    assert result.returncode == code
    assert "terminate" not in result.stderr
