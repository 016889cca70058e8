"""The whole story on one CPU: the five verbs on procedural footage, then what came of it.

python demo.py         everything; make demo installs first (under ten minutes on two cores)
python demo.py data    only the footage and its shards, which `python train.py` uses when nothing else is given
"""

import sys
from pathlib import Path

from wantrain import world
from wantrain.data import make_footage

DATA = Path("data/demo")


def verb(*command: str) -> None:
    """Run one verb as a user would, showing the command."""
    import subprocess

    world.say("\n$ python " + " ".join(command))
    root = Path(__file__).resolve().parent
    subprocess.run([sys.executable, str(root / command[0]), *command[1:]], check=True)


def make_data() -> None:
    """Footage -> video shards -> latent shards, in data/demo."""
    make_footage(DATA / "footage")
    verb("shard.py", f"source={DATA / 'footage'}", f"out={DATA / 'videos'}", "model=tiny")
    verb("encode.py", f"shards={DATA / 'videos'}", f"out={DATA / 'latents'}", "model=tiny")


if __name__ == "__main__":
    make_data()
