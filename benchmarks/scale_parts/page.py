"""The report in Markdown: every figure in it comes from the results."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from scale_parts.assumptions import Assumptions
from scale_parts.charts import NAMES

Results = Mapping[str, Any]
#: Bytes of memory that an open set takes for each further clip: `memory_bytes_per_clip` of plan.json.
OPENED = 43.5


def page(results: Results, *, words: Sequence[str] = ()) -> str:
    """The whole page. `words` are the assumptions that were given."""
    taken = Assumptions(**results["assumptions"])
    sections = [_top(taken, words), _assumed(taken)]
    sections += [make(taken, results) for make in (_order, _storage, _checkpoints, _failures, _costs)]
    return "\n".join(_wrapped(section) for section in [*sections, MISSING])


def _top(taken: Assumptions, words: Sequence[str]) -> str:
    return f"""
# A run on {taken.processes:,} cards, on paper

This page says what a run of all weights of an A14B expert on {taken.processes:,} cards and {taken.clips:,} clips would
need: order, storage, checkpoints, failures, GPU-hours. **All of it is calculated or simulated; nothing was measured on
a cluster.** The product's own code is driven: its samplers for every process and clip, its planner for memory,
operations and seconds, its writer of shards and its cache. What that code does not know is assumed, in one block.
{_commands(words)} `tests/house/test_scale.py`
holds what must be true of any: each clip once in an epoch, the same samples on half as many processes, equal work, the
equations' interval among the best.
"""


def _commands(words: Sequence[str]) -> str:
    """How this page is made, and how another; the page of given assumptions is of one command."""
    if words:
        return f"""
```bash
python benchmarks/scale.py {" ".join(words)}
```

It writes this page, its pictures and its numbers again (`scale.json` beside it)."""
    return """
```bash
python benchmarks/scale.py
python benchmarks/scale.py processes=256 clips=1e7 disk=20e9
```

The first writes this page, its pictures and its numbers again ([benchmarks/scale.py](../benchmarks/scale.py),
[scale.json](../benchmarks/scale.json)), in two minutes of a core and 3 GB. The second writes the report of another
cluster into `runs/scale`."""


def _assumed(taken: Assumptions) -> str:
    rows = [
        (f"`{field.name}`", _shown(getattr(taken, field.name)), field.metadata["meaning"], field.metadata["source"])
        for field in fields(taken)
    ]
    return f"""
## Assumptions

{_table(("Key", "Value", "Meaning", "Source"), rows)}

The run is `model=t2v_a14b expert=high_noise recipe=full_14b_8x80gb` under FSDP2 over all cards, in a step
one pass of each. Seconds are those of the planner's roofline ([memory](memory.md)).
"""


def _order(taken: Assumptions, results: Results) -> str:
    order, sides, steps = results["order"], results["balance"]["sides"], results["balance"]["steps"]
    clip_bytes, packs, opened = order["bytes_per_clip"], sides["packs"], order["measured"]["seconds_to_open"]
    rows = [
        (
            name,
            f"{side['busiest']:.3f}",
            f"{side['fewest']:,} to {side['most']:,}",
            f"{side['mean']:,.0f}",
            f"{side['rate_least']:,.0f} to {side['rate_most']:,.0f}",
        )
        for name, side in sides.items()
    ]
    heads = ("A step", "busiest card / mean", "tokens of a card", "mean", "tokens per second of a card")
    least, *_, most = sorted(steps.values(), key=lambda step: step["tokens"])
    repeated = order["samples_seen"] - order["distinct"]
    return f"""
## Order and balance

The order is arithmetic, so any process reaches any step at once. The sampler of all {taken.clips:,} clips opened in
{opened:.0f} s (measured, on one busy core), with {_bytes(clip_bytes["peak"] * taken.clips)}
at the peak and {_bytes(clip_bytes["kept"] * taken.clips)} afterwards in each process. With what else is kept of a clip
({OPENED} bytes together, [plan.json](../benchmarks/plan.json)) a node needs
{_bytes(taken.node * taken.clips * OPENED)} of its host.

An epoch has {order["steps_per_epoch"]:,} steps. In {order["steps_seen"]:,} of them, spread over the epoch, every step
{"is" if order["one_bucket_in_each_step"] else "is **not**"} of one bucket, and of {order["samples_seen"]:,} samples
{"none comes" if repeated == 0 else f"**{repeated:,}** come"} twice. On half as many processes, each in two passes, the
samples of a step are {"the same" if order["same_on_half_the_processes"] else "**others**"}.

The mix is the published one of [packing.py](../benchmarks/packing.py): {len(steps)} buckets of {least["tokens"]} to
{most["tokens"]:,} tokens. Useful tokens per second are two bounds: no exchange between cards hidden behind computation,
and all of it.

{_table(heads, rows)}

- With one bucket in each step all cards have equal work, so none waits. The price is small steps: one of
  `{least["bucket"]}` computes {least["compute"]:.2f} s, and exchanges weights and gradients in
  {least["exchange"]:.2f} s.
- Several clips for each card, or packs, make that small. Packs of {taken.pass_tokens:,} tokens are {packs["fill"]:.1%}
  full, and their busiest card has {packs["busiest"] - 1:.1%} more to do than the mean.
- Planning packs takes {packs["peak_bytes_per_clip"]:.0f} bytes a clip at the peak (seen at {taken.pack_clips:,} clips):
  {_bytes(packs["peak_bytes_per_clip"] * taken.clips)} in each process for all clips.

![Seconds of a step by bucket](images/{NAMES[0]})
"""


def _storage(taken: Assumptions, results: Results) -> str:
    found = results["storage"]
    need, mean, cuts, seen = found["read_per_second"], found["mean"], found["cuts"], found["cache"]
    rows = [
        (
            cut["shard_clips"],
            cut["shard_mb"],
            f"{cut['clips']:.0f}",
            f"{cut['files'] / 1e6:.2f} million",
            _bytes(cut["manifest"]),
            f"{cut['amplification']:.0f}",
            _bytes(cut["node"]),
        )
        for cut in cuts
    ]
    heads = ("`shard_clips`", "`shard_mb`", "clips of a shard", "shards", "manifest", "fetched / read",
             "fetched per second by a node")  # fmt: skip
    manifest, limit = _bytes(cuts[0]["manifest"]), _bytes(found["limit"])
    fix = ": give `shard_clips=` and `shard_mb=` more" if cuts[0]["manifest"] > found["limit"] else ""
    return f"""
## Storage

A clip has {_bytes(mean["latents"])} of latents in the mean and {_bytes(mean["text"])} of text ({taken.text_tokens}
tokens in bfloat16), as written into the tars: {_bytes(found["total"])} in all,
{mean["text"] / (mean["text"] + mean["latents"]):.0%} of it text. The index has {_bytes(found["index"])}.

**A shared file system.** Shards at a path are mapped, and only the clips of a step are read: {_bytes(need["card"])} per
second for a card, {_bytes(need["node"])} for a node, {_bytes(need["all"])} for all, with all exchange hidden. Steps of
`{need["worst_bucket"]}` alone would need {_bytes(need["worst_all"])} per second: most of it is text.

**Object storage.** The cache fetches whole shards, and the order draws from all of them. So a clip that is not in the
cache costs a shard of latents and one of texts. With `data.cache_gb={taken.cache_gb:g}` a node holds
{found["held"]:.2%} of the set:

{_table(heads, rows)}

- So this set is to be read from a shared file system. Object storage serves sets that the nodes' caches hold: there is
  no order that stays within a few shards, and no reading of parts of a shard.
- Larger shards make the manifest shorter and the fetching worse. With {cuts[0]["shard_clips"]} clips in a shard the
  manifest has {manifest}; from an address at most {limit} are taken{fix}.
- The cache was driven with small shards, for one node's reads in the run's order. Where it holds
  {", ".join(f"{row['held']:.0%}" for row in seen)} of the set, bytes fetched over bytes read are
  {", ".join(f"{row['amplification']:.1f}" for row in seen)}; (1 − part) × clips of a shard is
  {", ".join(f"{row['expected']:.1f}" for row in seen)}.

![Bytes fetched over bytes read](images/{NAMES[1]})
"""


def _checkpoints(taken: Assumptions, results: Results) -> str:
    found = results["failures"]
    parts = " + ".join(f"{name} {size / 1e9:.1f}" for name, size in found["parts"].items() if size)
    rows = [
        (disk, f"{save['pause']:.2f}", f"{save['behind']:.0f}", f"{save['cost']:.2f}")
        for disk, save in found["disks"].items()
    ]
    heads = ("Shared disk, GB/s", "the run waits, s", "until it is visible, s", "costs the run, s")
    return f"""
## Checkpoints

{parts} = {found["size"] / 1e9:.1f} GB, of which each process writes {_bytes(found["of_a_process"])}. All share the
disk, so more processes do not write faster. Each file, of at most 5 GiB, is then read back and hashed by one process.

{_table(heads, rows)}

The last column has the wait and the steps that are slower meanwhile ({taken.slower:.0%}). With
`checkpoint.background=false` the run waits until the checkpoint is visible.
"""


def _failures(taken: Assumptions, results: Results) -> str:
    found = results["failures"]
    rows = [
        (
            name,
            f"{curve['hours_between']:.0f}",
            f"{curve['young']:.0f}",
            f"{curve['daly']:.0f}",
            curve["best"],
            f"{curve['flat'][0]} to {curve['flat'][1]}",
            f"{curve['at_best']:.1%}",
            f"{curve['at_100']:.1%}",
            f"{curve['lost_hours']:.2f}",
        )
        for name, curve in found["curves"].items()
    ]
    heads = ("Failures, checkpoint", "hours between", "Young, steps", "Daly, steps", "best, simulated",
             "as good within 0.1 %", "goodput, simulated", "at every=100", "hours lost by each")  # fmt: skip
    often = found["curves"]["frequent, background"]
    error = max(curve["error"] for curve in found["curves"].values())
    return f"""
## Failures

An interruption of any card ends the run. It goes on after {found["restart_seconds"]:.0f} s, in which the checkpoint is
read, from the last checkpoint that was visible. Two published rates: Llama 3 had 419 interruptions that nobody had
planned in 54 days on 16,384 H100 ([The Llama 3 Herd of Models](https://arxiv.org/abs/2407.21783), section 3.3.4); for
OPT-175B on 992 A100 [less than twelve hours](https://glennklockwood.com/garden/job-reliability) between interruptions
are reported. A step takes {found["step_seconds"]:.1f} s. The Monte Carlo draws {taken.failures:,} failures and applies
the rules of [checkpoints](runs.md#checkpoints): a save waits for the one before, and what is not visible is lost.

{_table(heads, rows)}

- Young's interval is sqrt(2 × cost of a save × time between failures); Daly's has two terms more. Both should lie in
  the simulation's flat best, as the table shows. In the background a save costs little, so it should come often.
- `checkpoint.every=100`, the default, loses {100 * (often["at_best"] - often["at_100"]):.1f} points of goodput where
  failures are frequent; `checkpoint.every={often["best"]}` is the best there.
- Goodput is the share of all time that became steps which stayed; restarts, lost steps and saves are the rest. Its
  standard error is at most {error:.1%}; all intervals see the same failures.

![Goodput by interval](images/{NAMES[2]})
"""


def _costs(taken: Assumptions, results: Results) -> str:
    rows = [
        (
            row["name"],
            f"`{row['largest']['bucket']}`",
            row["cards"],
            row["clips"],
            f"{row['steps']:,}",
            _two(row["seconds"], ".2f"),
            f"{row['memory'] / 1e9:.0f}{'' if row['fits'] else ' (too much)'}",
            _two(row["gpu_hours"], ",.0f"),
            _two(row["days"], ".1f"),
        )
        for row in results["costs"]
    ]
    heads = ("Run", "largest clip", "cards", "clips of a card", "steps", "mean seconds of a step", "GB on a card",
             "GPU-hours", "days")  # fmt: skip
    scratch, curves = results["costs"][1:], results["failures"]["curves"]
    hours, days = ([sum(row[what][end] for row in scratch) for end in (0, 1)] for what in ("gpu_hours", "days"))
    more = [1 / curves[f"{name}, background"]["at_best"] - 1 for name in ("rare", "frequent")]
    return f"""
## Cost

GPU-hours from all exchange hidden behind computation to none of it, without failures, which add {more[0]:.1%} to
{more[1]:.1%} on {taken.processes:,} cards. First the full fine-tune of these pages, then the phases of
`recipe=high_noise_scratch` with its steps and batch sizes, on {taken.scratch_cards} cards; nobody has trained it.

{_table(heads, rows)}

All phases together: {_two(hours, ",.0f")} GPU-hours, {_two(days, ".0f")} days on {taken.scratch_cards} cards. Encoding
the clips is not in it.
"""


MISSING = """
## What is not in it

- The roofline's efficiencies are typical of kernels on an H100; none was measured here. A card that is slower than the
  others slows every step.
- Exchange is bytes over a bandwidth. Latency of collectives over many nodes and contention of the network are left out.
- Failures are independent, at exponential distances. Nodes that fail again and again, and losses that are noticed late,
  are left out.
- No index and no manifest of so many clips was opened: the largest was of 10^6
  ([plan.json](../benchmarks/plan.json)).
"""


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return (
        "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        .replace("| --- ", "|---")
        .replace("--- |", "---|")
    )


def _wrapped(text: str) -> str:
    """Paragraphs and items at the pages' width; headings, tables and pictures as they are."""
    blocks = []
    for block in text.strip().split("\n\n"):
        if block.startswith("- "):
            blocks += ["\n".join(_filled(f"- {item}", "  ") for item in re.split(r"^- ", block, flags=re.M)[1:])]
        else:
            blocks.append(block if block.startswith(("|", "#", "!", "```")) else _filled(block, ""))
    return "\n\n".join(blocks) + "\n"


def _filled(text: str, indent: str) -> str:
    words = " ".join(text.split())
    return textwrap.fill(words, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _shown(value: float | str) -> str:
    """A value as it can be given."""
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _two(ends: Sequence[float], form: str) -> str:
    """Two bounds, or one number where they read the same."""
    low, high = (f"{end:{form}}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _bytes(size: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
