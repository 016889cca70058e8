"""Makes the shards of the demo's procedural footage when a run needs them and they do not exist."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from wantrain.demo.vocabulary import SETS
from wantrain.util import distributed
from wantrain.util.console import say


def make_own_data(places: Iterable[str], *, root: Path) -> None:
    """Make the project's own shards (data/NAME/latents) if `places` name them and they do not exist.

    Runs demo.py, which lies in `root`, in the main process only; exits with its exit code if it fails.
    """
    for shards in map(Path, places):
        ours = shards.parent in {Path("data", name) for name in SETS}
        if distributed.is_main() and ours and not (shards / "manifest.json").is_file():
            say(f"making {shards.parent} (procedural clips; once)")
            make = [sys.executable, str(root / "demo.py"), "data", shards.parent.name]
            if code := subprocess.run(make, check=False, env=distributed.environment_without_launcher()).returncode:
                sys.exit(code)  # the child has printed the error
