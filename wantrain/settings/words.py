"""The words of a command line, before Hydra reads them: shorthands, text and paths as typed, the names of sweeps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from wantrain.settings.schema import PATH_KEYS, TEXT_KEYS

#: What a group set to one word means, where that is obvious: group=off, and group=NUMBER for the interval.
_OFF: Mapping[str, Sequence[str]] = {
    "tracker": ("tracker=jsonl",),
    "sample": ("sample.every=0",),
    "validation": ("validation.every=0",),
    "safeguards": ("safeguards.spike=null", "safeguards.refuse=null", "safeguards.hang=null"),
}
_EVERY = ("sample", "validation", "checkpoint")
_WORD = re.compile(r"(\+{0,2})([\w.@/]+)=(.*)", flags=re.DOTALL)
#: Values that can be a part of a run's name.
_NAMEABLE = re.compile(r"[A-Za-z0-9][\w.-]{0,23}")


def is_sweep(words: Iterable[str]) -> bool:
    """True if Hydra is asked to run every combination of values with commas between them."""
    return any(word in {"-m", "--multirun"} for word in words)


def expanded(words: Iterable[str]) -> list[str]:
    """The words with every shorthand replaced by what it means: `sample=50` is `sample.every=50`."""
    return [new for word in words for new in _meaning(word)]


def _meaning(word: str) -> Sequence[str]:
    group, _, value = word.partition("=")
    if value in {"off", "false"} and group in _OFF:
        return _OFF[group]
    if group in _EVERY and re.fullmatch(r"[\d,]+", value):
        return (f"{group}.every={value}",)
    return (word,)


def quoted(word: str, *, sweep: bool = False) -> str:
    """A word with its value quoted for Hydra if the key holds free text or a path.

    A path keeps `null`, and a leading `~` becomes the home folder (the shell leaves it alone after `key=`). In a sweep
    a comma separates values, and what stands in quotes is one value.
    """
    match = _WORD.fullmatch(word)
    if match is None or match[2] not in TEXT_KEYS | PATH_KEYS:
        return word
    prefix, key, value = match.groups()
    values = _split(value) if sweep else [value]
    return f"{prefix}{key}={','.join(_quoted_value(key, each) for each in values)}"


def _split(value: str) -> list[str]:
    """The values of a sweep: what stands between commas, without its quotes if it has any."""
    pieces = re.findall(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]*))\s*(?:,|$)""", value)
    pieces = pieces[:-1] if value and not value.endswith(",") and len(pieces) > 1 else pieces
    return [double or single or bare.strip() for double, single, bare in pieces]


def _quoted_value(key: str, value: str) -> str:
    if key in PATH_KEYS:
        if value in {"", "null"}:
            return "null"
        value = os.path.expanduser(value)  # noqa: PTH111 - Path would also drop a trailing slash as typed
    # Inside double quotes Hydra unescapes \" (and backslashes before a quote); OmegaConf then reads ${ as a reference.
    value = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    value = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], value)
    return f'"{value}"'


def swept_name(name: str, swept: Mapping[str, str], number: int) -> str:
    """The name of one run of a sweep: what is swept follows it, or the sweep's number where that makes no name.

    swept  keys and this run's values, as text
    """
    if not all(_NAMEABLE.fullmatch(value) for value in swept.values()):
        return f"{name}_{number}"
    return "_".join([name, *(f"{key.rsplit('.', 1)[-1]}_{value}" for key, value in swept.items())])
