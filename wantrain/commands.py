"""The commands of an install: `wantrain-train ...` and `python -m wantrain train ...` mean `python train.py ...`.

Each runs its file as a script, so that the processes it starts find that file again.
"""

from __future__ import annotations

import runpy
import sys
from functools import partial

from wantrain import __version__
from wantrain.util.shipped import ROOT

NAMES = ("caption", "shard", "encode", "train", "sample", "export", "demo", "doctor")
USAGE = f"""wantrain {__version__}
  python -m wantrain COMMAND ...   one of {", ".join(NAMES)}, with its settings; --help shows them
  accelerate launch -m wantrain train ...   the same in several processes
  python -m wantrain path FILE     where a file lies that comes with it, e.g. launch/accelerate/ddp.yaml"""


def run(name: str) -> None:
    """Run a command with the words in sys.argv after the first."""
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")


caption, shard, encode, train, sample, export, demo, doctor = (partial(run, name) for name in NAMES)


def main() -> None:
    """`python -m wantrain WORD ...`: run a command, or say where a file lies. Exit code 2 for another word."""
    match sys.argv[1:]:
        case [name, *rest] if name in NAMES:
            sys.argv[1:] = rest
            run(name)
        case ["path", file] if (ROOT / file).exists():
            print(ROOT / file)
        case ["path", file]:
            sys.exit(_refused(f"{file} does not come with wantrain; {ROOT} has conf, launch and assets/wan-tiny"))
        case ["path"]:
            sys.exit(_refused("path needs the name of a file, such as launch/accelerate/ddp.yaml"))
        case [] | ["--help" | "-h"]:
            print(USAGE)
        case ["--version"]:
            print(__version__)
        case [word, *_]:
            sys.exit(_refused(f"{word} is no command of wantrain; choose one of {', '.join((*NAMES, 'path'))}"))


def _refused(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
