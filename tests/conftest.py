"""One thread per test process: on a busy machine several would spin against each other, ten times slower."""

import torch

torch.set_num_threads(1)
