"""Messages to the user, printed by the main process only; errors as one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from wantrain.util.distributed import is_main


def say(message: str) -> None:
    """Print a message on rank 0 only, and flush."""
    if is_main():
        print(message, flush=True)


@contextmanager
def errors_to_exit_code() -> Iterator[None]:
    """For the entry point of a program: a ValueError is one line and exit code 2, Ctrl-C one line and exit code 130.

    Other errors are bugs.
    """
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
