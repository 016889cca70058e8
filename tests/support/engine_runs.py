"""Runs that engines are held against: their settings, and how far two runs are apart."""

import json
import os
import re
from pathlib import Path

import torch.nn.functional as F

from wantrain.models.formats.weights import read_file

ROOT = Path(__file__).resolve().parent.parent.parent
BOUND = 1e-5
STEPS = 50
WATCHED = ("data.holdout=0.2", "validation.every=25", "validation.clips=2", "validation.points=2")
FULL = ("batch_size=8", f"steps={STEPS}", f"checkpoint.every={STEPS}", *WATCHED)
LORA = (*FULL, "adapter=lora", "adapter.rank=4", "optimizer.lr=1e-2", "accumulate=2")
STEADY = ("schedule=constant", "schedule.warmup=0")  # the same rate whatever length the run is said to have
DORA = (*FULL, "adapter=dora", "adapter.rank=3", "optimizer.lr=1e-2")
SAMPLED = ("sample.every=50", "sample.count=1", "sample.steps=2", "model.num_frames=5")
PAIR = (*FULL, *SAMPLED, "expert=both", "experts.low_noise.lr=1e-3", "ema=0.9")
LOKR = (*FULL, "adapter=lokr", "adapter.rank=3", "adapter.factor=4", "optimizer.lr=1e-2")
PRODIGY = (*LORA[:-2], "optimizer=prodigy", "optimizer.d0=1e-3", "accumulate=2")
FREE = (*LORA[:-2], "optimizer=schedule_free", "optimizer.lr=1e-2", "schedule=constant", "accumulate=2")
WHAT = {"full": FULL, "lora": LORA, "dora": DORA, "lokr": LOKR, "prodigy": PRODIGY, "free": FREE, "pair": PAIR}


def linear_as_zero3(x, weight, bias=None, *, torchs=F.linear):
    """What DeepSpeed puts in the place of torch's `linear` under ZeRO-3, by its formula (deepspeed/runtime/zero/linear.py).

    Of more than two dimensions the product is rounded before the bias is added; torch adds it inside the product.
    """
    return torchs(x, weight, bias) if bias is None or x.ndim == 2 else torchs(x, weight) + bias


def measured(run):
    """Every loss of a run, in training and in validation, by step and name."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], key): row[key] for row in rows for key in row if key.endswith("loss")}


def weights(run):
    """Every trained tensor of a run's newest checkpoint, by file and name."""
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    files = [path for path in sorted(newest.rglob("*.safetensors")) if path.name != "optimizer.safetensors"]
    return {f"{path.relative_to(newest)}/{key}": value for path in files for key, value in read_file(path)[0].items()}


def difference(run, other):
    """Largest relative difference of a loss, and of a tensor of the weights (norm of the change over norm)."""
    found, wanted = measured(run), measured(other)
    assert found.keys() == wanted.keys()
    loss = max(abs(found[key] - value) / value for key, value in wanted.items())
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    moved = [((ours[key] - theirs[key]).norm() / theirs[key].norm()).item() for key in ours if theirs[key].any()]
    return loss, max(moved)


def hold(engine, what, run, one):
    """A run is within the bound of one process's, as the table of docs/numerics.md says."""
    loss, moved = difference(run, one)
    assert len(list((run / "samples").glob("*.mp4"))) == (2 if what == "pair" else 0)
    assert loss <= BOUND and moved <= BOUND, f"{engine} {what}: loss {loss:.1e}, weights {moved:.1e}"
    row = f"| {engine} | {what} | {loss:.0e} | {moved:.0e} |"
    page = ROOT / "docs" / "numerics.md"
    text = page.read_text()
    stands = re.search(rf"^\| {engine} \| {what} \|.*\|$", text, flags=re.M)
    assert stands, f"docs/numerics.md has no row for {engine} {what}"
    if os.environ.get("WANTRAIN_WRITE_DOCS"):
        page.write_text(text.replace(stands[0], row))
    assert all(float(figure) <= BOUND for figure in re.findall(r"\d+e-\d+", stands[0]))
