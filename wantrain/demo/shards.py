"""The shards of the demo's procedural footage, made when a run asks for them and they are not there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from wantrain.demo.footage import SETS
from wantrain.util import distributed
from wantrain.util.console import say


def make_own_data(places: Iterable[str], *, root: Path) -> None:
    """Make the project's own footage and shards (data/NAME/latents) if they are asked for and not there, and say so.

    Main process only; leaves with the child's exit code where that fails. `root` is the folder of demo.py.
    """
    for shards in map(Path, places):
        ours = shards.parent in {Path("data", name) for name in SETS}
        if distributed.is_main() and ours and not (shards / "manifest.json").is_file():
            say(f"making {shards.parent} (procedural clips; once)")
            make = [sys.executable, str(root / "demo.py"), "data", shards.parent.name]
            if code := subprocess.run(make, check=False, env=distributed.alone()).returncode:
                sys.exit(code)  # the child has said what is wrong
