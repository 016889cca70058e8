"""What a check of the doctor found, as a line that ends in ok or the fix, and what checks are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of doctor.py.

    about   what was looked at, in a word or two
    found   what there is
    fix     what to do; empty if nothing is wrong
    broken  whether training cannot go on with it; otherwise there is another way, and `fix` is for those who need it
    """

    about: str
    found: str
    fix: str = ""
    broken: bool = False

    def line(self) -> str:
        """The line: ends in ok, or in the fix."""
        end = "ok" if not self.fix else f"BROKEN: {self.fix}" if self.broken else f"note: {self.fix}"
        return f"{self.about:<14} {self.found} - {end}"


@dataclass(frozen=True)
class Options:
    """What checks are given.

    device   auto, cpu or cuda
    runs     folder in which runs will live
    timeout  seconds that the network is given to answer
    root     folder that holds the commands
    """

    device: str
    runs: Path
    timeout: float
    root: Path
