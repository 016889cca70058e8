"""The words of a command line, before Hydra reads them: shorthands, text and paths as typed, the names of sweeps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from wantrain.settings.schema import PATH_KEYS, TEXT_KEYS

#: What a group set to one word means, where that is obvious: group=off, and group=NUMBER for the interval.
_OFF: Mapping[str, Sequence[str]] = {
    "tracker": ("tracker=jsonl",),
    "recipe": (),
    "sample": ("sample.every=0",),
    "validation": ("validation.every=0",),
    "safeguards": tuple(
        f"safeguards.{key}=null" for key in ("spike", "refuse", "unlearning", "unlearning_stop", "hang")
    ),
}
_NULLABLE = ("tracker", "recipe")  # of the others null is not off: it leaves something to be chosen
_EVERY = ("sample", "validation", "checkpoint")
_WORD = re.compile(r"(\+{0,2})([\w.@/]+)=(.*)", flags=re.DOTALL)
_OPTION = re.compile(r"""(?!(?:null|true|false)\b)[A-Za-z_][\w./-]*|"[^"]*"|'[^']*'""", flags=re.IGNORECASE)
_OPTIONS = re.compile(rf"(?:{_OPTION.pattern}|\w+\(.*\))(?:\s*,\s*(?:{_OPTION.pattern}))*", flags=re.IGNORECASE)
#: Recipes to be composed, the later over the earlier.
_RECIPES = re.compile(r"recipe=\[?(\w+(?:,\w+)+)\]?")
#: Values that can be a part of a run's name.
_NAMEABLE = re.compile(r"[A-Za-z0-9][\w.-]{0,23}")


def is_sweep(words: Iterable[str]) -> bool:
    """True if Hydra is asked to run every combination of values with commas between them."""
    return any(word in {"-m", "--multirun"} for word in words)


def expanded(words: Iterable[str]) -> list[str]:
    """The words with every shorthand replaced by what it means: `sample=50` is `sample.every=50`, and without a sweep
    `recipe=one,other` is both, the later over the earlier.
    """
    words = list(words)
    several = None if is_sweep(words) else _RECIPES
    return [new for word in words for new in _meaning(several.sub(r"recipe=[\1]", word) if several else word)]


def _meaning(word: str) -> Sequence[str]:
    group, _, value = word.partition("=")
    if group in _OFF and (value in {"off", "false", "none"} or (value == "null" and group in _NULLABLE)):
        return _OFF[group]
    if group in _EVERY and re.fullmatch(r"[\d,]+", value):
        return (f"{group}.every={value}",)
    return (word,)


def refuse_choices(words: Iterable[str], choices: Mapping[str, Sequence[str]], *, sweep: bool = False) -> None:
    """Raise ValueError for a group of options that is set to what can be no option: a number, null, several at once;
    and for ~key, with which Hydra takes a key away: the commands need all of theirs.

    choices  the shipped options of each group; whether a name is one of them is Hydra's to say, which may know more
    """
    words = list(words)
    if deleted := next((word for word in words if word.startswith("~")), None):
        raise ValueError(
            f"{deleted} takes a key away, and all are needed; key=null or key=off turns off what can be off"
        )
    for word in words:
        if (match := _WORD.fullmatch(word)) is None:
            continue
        _, group, value = match.groups()
        right = _OPTIONS if sweep else _OPTION
        if (
            group in choices
            and not value.startswith("{")
            and not right.fullmatch(value)
            and not _RECIPES.fullmatch(word)
        ):
            several = "; -m runs one after the other" if "," in value else ""
            also = ", off" if group in _OFF else ""
            raise ValueError(f"{group}={value} must be one of {', '.join(choices[group])}{also}{several}")


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
