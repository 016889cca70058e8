"""wantrain: train and fine-tune the Wan2.2 video family, and be able to trust what comes out."""

import os

__version__ = "0.1.0"

# How long a thread of OpenMP that waits for others spins before it sleeps; read once, when torch is loaded. By default
# that is so long that a process hardly moves where others want the same cores (docs/speed.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
