"""Whether the data have the masks that a loss goes by: looked at in the index, before a run starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from wantrain.data import TrainingData
from wantrain.losses import FlowMatching, LossFunction
from wantrain.util.console import say


def check(losses: Iterable[LossFunction], data: TrainingData[Any]) -> None:
    """Say how many clips have a mask, where a loss goes by masks.

    ValueError if none has, or if a mask leaves no pixel to learn from.
    """
    masks = next((loss.core.masks for loss in losses if isinstance(loss.core, FlowMatching)), None)
    if masks is None or masks.mode == "none":
        return
    counts = data.mask_counts()
    if not any(count.masked for count in counts):
        raise ValueError(
            f"loss.mask={masks.mode}: the latents in {data.folder} come without masks; put masks/NAME.mp4 or "
            "masks/NAME.png beside the footage, run shard.py again, and encode again with python encode.py "
            "loss_mask=true"
        )
    for count in counts:
        of_set = f"data.sets.{count.name}: " if count.name else ""
        say(f"{masks.about}: {of_set}{count.masked} of {count.windows} clips have a mask; the others count whole")
    names = [name for count in counts for name in (count.all_black if masks.blank == "black" else count.all_white)]
    if masks.blank and names:
        raise ValueError(
            f"loss.mask={masks.mode} leaves no pixel of {len(names)} clips (first: {names[0]}): their masks are "
            f"{masks.blank} throughout; give loss.mask_rest a number above 0, change these masks, or remove them: a "
            "clip without a mask counts whole"
        )
