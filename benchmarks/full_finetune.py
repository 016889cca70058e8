"""What fewer bytes cost a full fine-tune: python benchmarks/full_finetune.py

wan-tiny's low-noise expert trains all its weights on the demo's new object, under every way of keeping weights, moments
and gradients, with three seeds. Beside each stands float32 AdamW with the same seed: the same clips, noise and
validation. One more row rounds bfloat16 weights to the nearest, which train.py does not offer, to show what the others
avoid. Prints a table in Markdown and writes full_finetune.json beside this file after each run; `--only NAME,...` adds
some rows to it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
from quantize import WEIGHTS, command, make_latents
from torch import Tensor

from wantrain.training.engine import parameterwise
from wantrain.util import distributed
from wantrain.util.files import write_json

SEEDS, STEPS = (0, 1, 2), 80
#: Relative difference of the final validation loss from float32 AdamW's, mean over seeds, that was set as the limit
#: before any of this ran.
MARGIN = 0.01
REFERENCE = "adamw"
BF16, KAHAN, EIGHT = ("trained.dtype=bf16",), ("trained.dtype=bf16", "trained.rounding=kahan"), "optimizer=adamw_8bit"
#: The rows: name -> what is given to train.py.
CHOICES: dict[str, tuple[str, ...]] = {
    REFERENCE: (),
    "adamw bf16 stochastic": BF16,
    "adamw bf16 kahan": KAHAN,
    "adamw bf16 nearest": BF16,
    "adamw clip_by=parameter": ("clip_by=parameter",),
    "adamw_8bit": (EIGHT,),
    "adamw_8bit bf16 stochastic": (EIGHT, *BF16),
    "adamw_8bit bf16 stochastic in backward": (EIGHT, *BF16, "update_in_backward=true", "clip_by=parameter"),
    "adamw_8bit bf16 stochastic in backward clip=null": (
        EIGHT,
        *BF16,
        "update_in_backward=true",
        "clip=null",
    ),
    "adafactor": ("optimizer=adafactor",),
    "adafactor bf16 stochastic": ("optimizer=adafactor", *BF16),
}


def main() -> None:
    """Train every row with every seed, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CHOICES))
    names, out = parser.parse_args().only.split(","), Path(__file__).with_suffix(".json")
    distributed.set_threads()
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"rows": {}}
    result |= {"steps": STEPS, "seeds": list(SEEDS), "margin": MARGIN, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_latents(folder)
        for name in names:
            result["rows"][name] = []
            for seed in SEEDS:
                result["rows"][name].append(train(folder, name, seed))
                compare(result["rows"])
                write_json(out, result)
    print("\n| choice | before | after, by seed | against float32 AdamW, by seed | mean |\n" + "|---" * 5 + "|")
    for name, rows in result["rows"].items():
        after, beside = (", ".join(row[key] for row in shown(rows)) for key in ("end", "against"))
        print(f"| {name} | {mean(row['start'] for row in rows):.5f} | {after} | {beside} | {mean_of(rows):+.2%} |")


def train(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """One run: validation loss before and after it, and its seconds."""
    run = f"{name.replace(' ', '_').replace('=', '_')}_{seed}"
    given = [f"data.shards={folder / 'latents'}", f"run={run}", f"seed={seed}", "precision=bf16", f"steps={STEPS}"]
    given += ["batch_size=4", "tracker=jsonl", f"validation.every={STEPS}", "validation.clips=8", "check_expert=off"]
    given += ["validation.points=8", "data.seed=0", "data.holdout=0.2", f"checkpoint.every={STEPS}", WEIGHTS]
    given += CHOICES[name]
    began = time.perf_counter()
    with rounding_to_nearest() if "nearest" in name else contextlib.nullcontext():
        command(folder, "train.py", *given)
    lines = (folder / "runs" / run / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if (record := json.loads(line))["weights"] == "live"]
    assert (records[0]["step"], records[-1]["step"]) == (0, STEPS)
    start, end = (torch.tensor(record["heldout"]).mean().item() for record in (records[0], records[-1]))
    print(f"{name}, seed {seed}: {start:.5f} -> {end:.5f}, {time.perf_counter() - began:.0f} s", flush=True)
    return {"seed": seed, "start": start, "end": end, "seconds": time.perf_counter() - began}


@contextlib.contextmanager
def rounding_to_nearest() -> Iterator[None]:
    """While active, what would be rounded stochastically is rounded to the nearest."""

    def nearest(values: Tensor, into: Tensor, seed: int) -> None:
        into.copy_(values)

    with mock.patch.object(parameterwise, "round_stochastically", nearest):
        yield


def compare(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Put the relative difference from float32 AdamW of the same seed into every run."""
    wanted = {row["seed"]: row["end"] for row in rows.get(REFERENCE, [])}
    for own in rows.values():
        for row in own:
            row["against"] = row["end"] / wanted[row["seed"]] - 1


def mean_of(rows: list[dict[str, Any]]) -> float:
    """The mean difference over seeds."""
    return mean(row["against"] for row in rows)


def shown(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The figures of a row's runs as text."""
    return [{"end": f"{row['end']:.5f}", "against": f"{row['against']:+.2%}"} for row in rows]


if __name__ == "__main__":
    main()
