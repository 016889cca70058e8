"""What runs cost in GPU-hours: steps by the planner's seconds."""

from __future__ import annotations

from typing import Any

from scale_parts.assumptions import Assumptions
from scale_parts.cluster import Cluster, Step

SCRATCH = "recipe=high_noise_scratch"


def costs(taken: Assumptions, full: Step) -> list[dict[str, Any]]:
    """A row for the full fine-tune on all cards, and one for each phase of high_noise from scratch, as its recipe has
    them.
    """
    rows = [_row("full fine-tune", taken.processes, taken.finetune_steps, {full: 1.0})]
    cluster = Cluster(taken, [SCRATCH], cards=taken.scratch_cards)
    settings, buckets = cluster.forecast.settings, taken.size_of()
    schedule = settings["data"]["schedule"]
    for entry, then in zip(schedule, [*schedule[1:], {"from": settings["steps"]}], strict=True):
        clips = (entry.get("batch_size") or settings["batch_size"]) // taken.scratch_cards
        whole = sum(entry["sets"].values())
        steps = {cluster.step(buckets[name], clips): weight / whole for name, weight in entry["sets"].items()}
        rows.append(_row(" + ".join(entry["sets"]), taken.scratch_cards, then["from"] - entry["from"], steps))
    return rows


def _row(name: str, cards: int, steps: int, mix: dict[Step, float]) -> dict[str, Any]:
    """So many steps of a mix, each with its share."""
    seconds = [sum(part * getattr(step, what) for step, part in mix.items()) for what in ("least", "most")]
    most = max(mix, key=lambda step: step.memory)
    return {
        "name": name,
        "cards": cards,
        "clips": most.clips,
        "steps": steps,
        "seconds": seconds,
        "memory": most.memory,
        "fits": most.fits,
        "gpu_hours": [cards * steps * each / 3600 for each in seconds],
        "days": [steps * each / 86400 for each in seconds],
        "largest": vars(most),
    }
