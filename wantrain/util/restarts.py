"""Whether a launch starts its processes again after an error, as torch's elastic agents do by themselves (node.sh).

An error that the user has to correct would come again, so the process that meets it closes the rendezvous of the
agents, and those of all nodes end.
"""

from __future__ import annotations

import os
from contextlib import suppress

#: Seconds that the launchers' store may take to answer.
ANSWER = 5


class Transient(ValueError):
    """An error that another start may not meet: of a network, a server, or another process."""


def end_restarts() -> None:
    """Tell the launchers of all nodes to start nothing again; nothing where none does, or where they do not answer."""
    store, run = os.environ.get("WANTRAIN_STORE"), os.environ.get("TORCHELASTIC_RUN_ID")
    if not store or not run or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    how = RendezvousParameters("c10d", store, run, 1, 1, is_host=False, read_timeout=ANSWER, close_timeout=ANSWER)
    with suppress(RendezvousError, RuntimeError):  # torch's own errors of networks and stores
        backend, found = create_backend(how)
        create_handler(found, backend, how).set_closed()
