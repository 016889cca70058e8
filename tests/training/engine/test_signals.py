"""Signals that ask a run to stop."""

import os
import signal

import pytest

from wantrain.training.engine.signals import Signals


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of before, whatever a test leaves."""
    before = {number: signal.getsignal(number) for number in Signals.watched}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", Signals.watched)
def test_signal_is_noted(number):
    """Each signal is noted and ends nothing; the handler of before comes back."""
    signal.signal(number, signal.SIG_DFL)
    with Signals() as signals:
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) == signal.SIG_DFL


def test_nohup():
    """A hangup that is ignored already, as under nohup, stays ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
