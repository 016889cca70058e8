"""Messages to the user: said once, by the main process; errors become one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from wantrain.util.distributed import is_main


def say(message: str) -> None:
    """Tell the user something, once: rank 0 only, on standard output, at once."""
    if is_main():
        print(message, flush=True)


@contextmanager
def errors_to_exit_code() -> Iterator[None]:
    """At the door of a program: a ValueError is one clear line for the user and exit code 2; the rest is a bug."""
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
