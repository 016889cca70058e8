"""What lies below a source beside footage and rejects: files that were read for it, and what is ignored, by kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts every file and folder of a source that is neither footage nor a reject.

    read     files that were read for the footage: caption files, tables, tars
    ignored  files and folders that were not read, by kind; a folder counts once, whatever it holds
    first    the first name of each ignored kind
    notes    what else was not heard, one line each
    """

    read: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ignore(self, kind: str, name: str) -> None:
        """Count one file or folder as ignored."""
        self.ignored[kind] += 1
        self.first.setdefault(kind, name)

    def to_dict(self) -> dict[str, dict[str, int]]:
        """For a manifest: the counts of `read` and of `ignored`, the largest first."""
        return {"read": _sorted(self.read), "ignored": _sorted(self.ignored)}

    def lines(self) -> list[str]:
        """A few lines of text: what was read beside the footage, what was ignored, and the notes."""
        lines = []
        if self.read:
            lines.append("read too: " + ", ".join(f"{count} {kind}" for kind, count in _sorted(self.read).items()))
        if self.ignored:
            kinds = [f"{count} {kind} (first: {self.first[kind]})" for kind, count in _sorted(self.ignored).items()]
            lines.append(f"ignored: {sum(self.ignored.values())} = {' + '.join(kinds)}")
        return [*lines, *self.notes]


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
