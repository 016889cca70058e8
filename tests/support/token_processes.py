"""One of the processes of a launch that share the tokens of each clip, over gloo.

python token_processes.py FILE RANK PROCESSES

The first writes each case of tests/models/test_sequence.py: the velocity, and the mean of all processes' gradients.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from test_sequence import CASES, SIZE, inputs, network, step

from wantrain.models.sequence import SequenceParallel


def main(file, rank, size):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=size)
    found = {}
    sequence = SequenceParallel.over(size, size, torch.device("cpu"), num_heads=SIZE["num_attention_heads"])
    for name, (given, more) in CASES.items():
        model = network(**more)
        sequence.split(model)
        velocity, grads = step(model, inputs(**given))
        for grad in grads.values():
            dist.all_reduce(grad)
            grad /= size
        found |= {f"{name}/{key}": value.contiguous() for key, value in {"velocity": velocity, **grads}.items()}
    if rank == 0:
        save_file(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
