"""What counts as a number in a config or a stored file."""

from __future__ import annotations


def is_number(value: object, *, whole: bool = False) -> bool:
    """True for a number (with `whole`, for a whole number). True and False do not count as numbers."""
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)
