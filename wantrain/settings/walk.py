"""A composed config compared with the schema: every value of a wrong kind, and every key that does not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

from wantrain.settings.kinds import Object, fits, keywords, problem, shown

#: What the name in a `_target_` stands for; any error if nothing.
Lookup = Callable[[str], Any]


def problems(values: Mapping[str, Any], schema: Mapping[str, Any], lookup: Lookup, *, command: str) -> dict[str, str]:
    """What is wrong, by key, one line each.

    values  the config as plain data, every reference resolved
    schema  dotted keys and their kinds (schema.py)
    """
    groups = {key[:at] for key in schema for at, sign in enumerate(key) if sign == "."}
    return dict(_below(values, "", schema, groups, lookup, command))


def _below(
    values: Mapping[str, Any], prefix: str, schema: Mapping[str, Any], groups: Set[str], lookup: Lookup, command: str
) -> Iterator[tuple[str, str]]:
    kinds: Mapping[str, Any] = {}
    takes_others = False
    if "_target_" in values:
        try:
            kinds, takes_others = keywords(lookup(str(values["_target_"])))
        except Exception as error:  # whatever importing somebody's module raises
            reason = " ".join(str(error).split())
            yield (
                f"{prefix}_target_",
                (f"{prefix}_target_={shown(values['_target_'])} is no class that can be imported: {reason}"),
            )
            return
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name == "_target_":
            continue
        kind = schema.get(key, kinds.get(name))
        if kind is None and key not in groups:
            if kinds and not takes_others:
                takes = ", ".join(each for each in kinds if each != "params")
                yield key, f"{key} is no keyword of {values['_target_']}; it takes {takes}"
            elif not takes_others:
                yield key, f"{key} is not a key of {command}.py (python {command}.py --cfg job lists all)"
        elif isinstance(value, Mapping) and (kind is None or "_target_" in value):
            if kind is not None and not fits(value, kind):
                yield key, problem(key, value, kind) or ""
            else:
                yield from _below(value, f"{key}.", schema, groups, lookup, command)
        elif kind is None or (kind is Object and key in groups):
            yield key, group_problem(key, value, schema)
        elif wrong := problem(key, value, kind):
            yield key, wrong


def group_problem(key: str, value: Any, schema: Mapping[str, Any]) -> str:
    """What to say of a group that is set to one value: how its first keys are given."""
    inner = dict.fromkeys(
        other.removeprefix(f"{key}.").split(".")[0] for other in schema if other.startswith(f"{key}.")
    )
    return f"{key}={shown(value)} must be given by its keys: {', '.join(f'{key}.{each}=' for each in list(inner)[:6])}"
