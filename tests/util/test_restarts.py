"""A launch that starts its processes again ends at once by an error that the user has to correct."""

import time

import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from wantrain.util import restarts
from wantrain.util.console import errors_to_exit_code
from wantrain.util.restarts import Transient


@pytest.fixture
def store(monkeypatch):
    """The launchers' store, and the environment that an agent gives its processes."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = {"STORE": f"127.0.0.1:{store.port}"}
    for key, value in given.items():
        monkeypatch.setenv(f"WANTRAIN_{key}", value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    return store


def agent_starts(store):
    """True if an agent of one node may start its processes: torch's own, as node.sh asks for it."""
    how = RendezvousParameters("c10d", f"127.0.0.1:{store.port}", "none", 1, 1, local_addr="127.0.0.1", is_host=False)
    backend, found = create_backend(how)
    handler = create_handler(found, backend, how)
    try:
        handler.next_rendezvous()
    except RendezvousClosedError:
        return False
    handler._stop_heartbeats()
    return True


def fail(error):
    with pytest.raises(SystemExit) as ended, errors_to_exit_code():
        raise error
    assert ended.value.code == 2


def test_settings_error(store):
    """After an error of settings no agent starts anything; after one that may pass it does."""
    assert agent_starts(store)
    fail(ValueError("a=1 is wrong"))
    assert not agent_starts(store)


@pytest.mark.parametrize("error", [Transient("the server is away"), OSError(28, "full")], ids=["network", "disk"])
def test_error_that_may_pass(error, store):
    """What another start may not meet leaves the launch its restarts."""
    fail(error)
    assert agent_starts(store)


def test_without_launchers(store, monkeypatch):
    """Without restarts nothing is closed, and a store that does not answer delays the end by seconds at most."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    fail(ValueError("a=1 is wrong"))
    assert agent_starts(store)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("WANTRAIN_STORE", "127.0.0.1:1")
    monkeypatch.setattr(restarts, "ANSWER", 1)
    began = time.monotonic()
    restarts.end_restarts()
    assert time.monotonic() - began < 5
