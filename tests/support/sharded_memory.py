"""What a process takes of the host's memory while a model of 1 GB is loaded and saved: python sharded_memory.py.

Run by a launcher, in a folder with model/. Writes memory_RANK.json: bytes, all beside what stood before.
"""

import contextlib
import json
import threading
from pathlib import Path

import torch

from wantrain.models import load_transformer
from wantrain.models.formats.weights import PART
from wantrain.runs.checkpoint import Checkpoints
from wantrain.training.engine.accelerator import engine_of, first_store, start_accelerator
from wantrain.training.engine.engine import StepOptions, finish
from wantrain.training.engine.joint_save import Crew, JointSaver, Tensors
from wantrain.training.engine.optim import build_optimizer
from wantrain.training.engine.placement import Placement
from wantrain.training.engine.slices import Slicer

#: 266 million parameters, of which a block has 16.8 million.
SIZE = {
    "num_attention_heads": 8, "attention_head_dim": 128, "text_dim": 8, "text_length": 6, "ffn_dim": 4096,
    "freq_dim": 16, "num_layers": 15,
}  # fmt: skip


def memory(kind):
    """Bytes of this process: RssAnon (its own) or RssShmem (shared with others)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def peak():
    """The largest growth of each kind while this is active."""
    start = {kind: memory(kind) for kind in ("RssAnon", "RssShmem")}
    found, over = dict.fromkeys(start, 0), threading.Event()

    def watch():
        while not over.wait(0.002):
            for kind in start:
                found[kind] = max(found[kind], memory(kind) - start[kind])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def main():
    accelerator = start_accelerator("cpu", hang=None)
    rank, device = accelerator.process_index, accelerator.device
    engine = engine_of(accelerator)
    warm = torch.nn.Linear(2, 2)
    torch.optim.AdamW(warm.parameters())  # imports
    with peak() as loading:
        module = load_transformer("model", mapped=True)
        optimizer = build_optimizer(lambda groups: torch.optim.AdamW(groups, lr=1e-3), module)
        placement = Placement(accelerator, engine, device, torch.device("cpu"), None)
        stepper = placement.stepper(module, optimizer, StepOptions(1, 1.0, "fp32"), frozen=torch.float32)
    stepper.begin(1.0, 0)
    stepper.backward(stepper.wrapped(torch.ones(1, 16, 1, 2, 2), torch.ones(1), torch.ones(1, 4, 8)).sum(), last=True)
    stepper.clip_gradients()
    stepper.step(update=True)
    crew, saving = Crew(rank, accelerator.num_processes, first_store()), {}
    for number, background in enumerate((False, True), 1):
        checkpoints, saver = (
            Checkpoints(Path("c"), keep=1, background=background),
            JointSaver(crew, background=background),
        )
        saver._numbers = iter([number])
        if rank == 0:
            checkpoints.prepare()
        slicer = Slicer(stepper, rank)
        with peak() as found:
            parts = [Tensors("transformer", PART, slicer.weights(module.state_dict(keep_vars=True)))]
            parts.append(Tensors("", "optimizer", slicer.optimizer()))
            share = sum(s.count * s.dtype.itemsize for each in parts for s in each.slices.values())
            if background:
                parts = [each.copied(stepper.copier) for each in parts]
            save = saver.begin(parts)
            if rank == 0:
                checkpoints.save(number, save.write, {}, size=save.size, ended=save.ended)
                checkpoints.finish()
            saver.wait()
        saving["background" if background else "at once"] = found["RssAnon"]
    Path(f"memory_{rank}.json").write_text(json.dumps({"loading": loading, "saving": saving, "share": share}))
    finish([stepper])


if __name__ == "__main__":
    main()
