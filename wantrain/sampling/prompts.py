"""Prompts from a file, and the list of sampling jobs: every prompt with every seed."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wantrain.util.console import say


@dataclass(frozen=True)
class Job:
    """One video to make; `number` is its place in the list."""

    number: int
    prompt: str
    seed: int


def read_prompts(path: str | Path) -> list[str]:
    """One prompt per line, in any language; blank lines are skipped.

    ValueError for a file that is absent, has no prompt, or is not UTF-8 text, naming the line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"the prompt file {path} does not exist")
    prompts = []
    # Not splitlines(): it also splits at U+2028, U+0085 and others, which a prompt may contain.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            prompt = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the prompt file {path}, line {number}, is not UTF-8 text ({error.reason} at byte {error.start} of "
                "it); save the file as UTF-8"
            ) from error
        if control := next((sign for sign in prompt if unicodedata.category(sign) == "Cc" and sign != "\t"), None):
            raise ValueError(
                f"the prompt file {path}, line {number}, holds the control character U+{ord(control):04X}: it is no "
                "text, or was saved as UTF-16; save it as UTF-8, one prompt per line"
            )
        if prompt:
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"the prompt file {path} holds no prompt; write one per line")
    return prompts


def list_jobs(prompts: Sequence[str], *, seed: int, count: int) -> list[Job]:
    """Each prompt with `count` seeds: `seed`, `seed` + 1, ...; repeated prompts are dropped."""
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < len(prompts):
        say(f"{len(prompts) - len(distinct)} of {len(prompts)} prompts come more than once; each is made once")
    pairs = [(prompt, own) for prompt in distinct for own in range(seed, seed + count)]
    return [Job(number, prompt, own) for number, (prompt, own) in enumerate(pairs)]
