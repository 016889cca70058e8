"""What a data stage does not use, with the reason; and which extensions count as footage."""

from __future__ import annotations

from dataclasses import dataclass

VIDEOS = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"))


IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))


@dataclass(frozen=True)
class Reject:
    """A file, or a clip of one, that is not used, and why: in full, and as one of a few `kind`s that are counted.

    Only `bad` ones count towards rejects.limit.
    """

    name: str
    reason: str
    bad: bool = True
    kind: str = "unreadable"
