"""Two samples of each prompt beside each other, on a page where a person clicks the better one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from wantrain import page
from wantrain.sampling.gallery import Gallery, read_samples
from wantrain.sampling.prompts import Job
from wantrain.util.console import say
from wantrain.util.files import write_atomically

#: The page, the table that it saves, and the samples' captions, which shard.py reads.
PAGE, TABLE, CAPTIONS = "pairs.html", "pairs.csv", "metadata.jsonl"


def write_pairs(gallery: Gallery, jobs: Sequence[Job]) -> None:
    """The page of the pairs in a folder, and the captions of its samples. `jobs` are those of this command.

    The samples of a prompt make pairs in the order of their seeds; without a partner one is left out.
    """
    folder, by_prompt = gallery.folder, dict[str, list[dict[str, Any]]]()
    for about in sorted(read_samples(folder), key=lambda about: (about["prompt"], about["seed"], about["file"])):
        by_prompt.setdefault(about["prompt"], []).append(about)
    pairs = [_sides(*pair) for own in by_prompt.values() for pair in zip(own[::2], own[1::2], strict=False)]
    lines = [{"path": each["file"], "caption": each["prompt"]} for own in by_prompt.values() for each in own]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(folder / CAPTIONS, text)
    title = f"Pairs in {folder.name}"
    write_atomically(folder / PAGE, page.render("pairs", title, pairs=pairs, table=TABLE, folder=folder.as_posix()))
    say(f"{folder / PAGE} shows {len(pairs)} pairs, {len(jobs) // 2} of them of these prompts; choose, save {TABLE}")


def _sides(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A pair as the page shows it. Which one stands left depends on a hash: order must not tell seeds apart."""
    left, right = (one, other) if int(one["identity"], 16) % 2 else (other, one)
    return {"prompt": one["prompt"], "files": [left["file"], right["file"]]}
