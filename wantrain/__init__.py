"""wantrain: train and fine-tune the Wan2.2 video family, and be able to trust what comes out."""

import os

__version__ = "0.1.0"

# How OpenMP's threads wait for each other; read once, when torch is loaded. By default they spin, which costs up to ten
# times where other processes want the same cores (docs/speed.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
