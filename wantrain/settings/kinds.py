"""Kinds of values, as annotated types that pydantic checks, and the words for what a kind allows.

A config is JSON-like data, so values are checked as JSON, strictly: true is no number, 1.0 is no whole number, a list
may stand for a tuple. Infinity and NaN are no numbers.
"""

from __future__ import annotations

import functools
import inspect
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError


class Says(str):
    """Metadata of a kind: what it allows, where its type does not say it well."""


class TypedFreely:
    """Metadata of a text that people type as it is: no sign in it means anything to Hydra."""


class IsPath:
    """Metadata of a path: typed as it is, with ~ for the home folder; `null` and nothing are null."""


class Object:
    """An object: a mapping with `_target_`, whose constructor says what its keys may hold."""


Text = Annotated[str, Says("text")]
FreeText = Annotated[str, Says("text"), TypedFreely()]
File = Annotated[str, Says("a path"), IsPath()]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
#: Both ends included.
Share = Annotated[float, Ge(0), Le(1)]
#: Both ends excluded.
Inside = Annotated[float, Gt(0), Lt(1)]
#: 0 included, 1 excluded.
BelowOne = Annotated[float, Ge(0), Lt(1)]

_CONFIG = ConfigDict(strict=True, allow_inf_nan=False)
_SCALARS = (int, float, str, bool, types.NoneType, Path, Any)
_CONTAINERS = (list, tuple, dict, Sequence, Mapping)


def problem(key: str, value: Any, kind: Any) -> str | None:
    """What is wrong with a value of a kind, as one line that begins with key=value; None if nothing is."""
    if fits(value, kind):
        return None
    parts = _members(kind)
    if all(get_origin(part) is Literal or part is types.NoneType for part in parts):
        return f"{key}={shown(value)} is unknown; choose one of {', '.join(_choices(parts))}"
    if limits := _broken_limits(value, parts):
        return f"{key}={shown(value)} must be {limits}"
    return f"{key}={shown(value)} must be {described(kind)}"


def fits(value: Any, kind: Any) -> bool:
    """True if the value is of the kind. An object is only asked whether the kind takes objects, and a kind that is a
    class of somebody's own is left to its constructor.
    """
    if isinstance(value, Mapping) and "_target_" in value:
        return kind is Any or any(_plain(part) is not part for part in _members(kind))
    plain = [form for part in _members(kind) if (form := _plain(part)) is not None]
    if not plain and kind is not Object:
        return True
    try:
        text = json.dumps(value)
    except TypeError:  # bytes or dates, which no key takes
        return False
    return any(_accepts(part, text) for part in plain)


def _accepts(kind: Any, text: str) -> bool:
    try:
        _adapter(kind).validate_json(text)
    except ValidationError:
        return False
    return True


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=_CONFIG)


def _plain(kind: Any) -> Any:
    """The part of a kind that plain values can have: the kind itself if that is all of it, None if there is none."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal or kind in _SCALARS or kind in _CONTAINERS:
        return kind
    if origin is Annotated:
        return kind if _plain(inner[0]) is not None else None
    if origin in (Union, types.UnionType, *_CONTAINERS):
        forms = [part if part is Ellipsis else _plain(part) for part in inner]
        if all(form is part for form, part in zip(forms, inner, strict=True)):
            return kind
        left = tuple(form for form in forms if form is not None)
        if origin in (Union, types.UnionType):
            return Union[left] if left else None  # noqa: UP007 - a union of a computed tuple
        return origin[left] if len(left) == len(inner) else None
    return None


def _members(kind: Any) -> list[Any]:
    """The members of a union, flat; of another kind itself."""
    if get_origin(kind) in (Union, types.UnionType):
        return [part for member in get_args(kind) for part in _members(member)]
    return [kind]


def _choices(parts: Sequence[Any]) -> list[str]:
    return [shown(choice) for part in parts if get_origin(part) is Literal for choice in get_args(part)]


def _broken_limits(value: Any, parts: Sequence[Any]) -> str | None:
    """The limits that a number of the right type breaks, in words; None for another value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    for part in parts:
        bare = get_args(part)[0] if get_origin(part) is Annotated else part
        if bare in (int, float) and fits(value, bare):
            return _limits(part)
    return None


def _limits(kind: Any) -> str:
    """The limits of a kind of numbers, in words; empty for none."""
    limits = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    low = next((each for each in limits if isinstance(each, Ge | Gt)), None)
    high = next((each for each in limits if isinstance(each, Le | Lt)), None)
    if isinstance(low, Ge) and low.ge == 1 and high is None:
        low = Gt(0)  # of whole numbers
    words = [f"above {low.gt}" if isinstance(low, Gt) else f"at least {low.ge}"] if low else []
    words += [f"below {high.lt}" if isinstance(high, Lt) else f"at most {high.le}"] if high else []
    return " and ".join(words)


def described(kind: Any) -> str:
    """What a kind allows: "a whole number above 0, or null"."""
    parts = _members(kind)
    words = [_noun(part) for part in parts if get_origin(part) is not Literal and part is not types.NoneType]
    words += [f"one of {', '.join(choices)}"] if (choices := _choices(parts)) else []
    words += ["null"] if types.NoneType in parts else []
    return ", or ".join(dict.fromkeys(words))


def _noun(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        bare, *more = get_args(kind)
        if said := [each for each in more if isinstance(each, Says)]:
            return str(said[0])
        return f"{_noun(bare)} {_limits(kind)}".strip()
    nouns = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    if kind in nouns:
        return nouns[kind]
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (dict, Mapping):
        return "a mapping {name: value}"
    if origin in _CONTAINERS:
        several = [described(part) for part in inner if part is not Ellipsis]
        count = f"{len(several)} values" if origin is tuple and Ellipsis not in inner else "values"
        return f"a list of {count}, each {several[0]}" if several else "a list"
    return "an object with _target_"


def shown(value: Any) -> str:
    """A value as it is typed, on one line."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def has(kind: Any, metadata: type) -> bool:
    """True if a member of the kind carries metadata of this class."""
    return any(isinstance(each, metadata) for part in _members(kind) for each in getattr(part, "__metadata__", ()))


def keywords(constructor: Any) -> tuple[dict[str, Any], bool]:
    """The kinds of a constructor's keywords by its annotations, Any where it has none; whether it takes any others."""
    try:
        parameters = inspect.signature(constructor, eval_str=True).parameters.values()
    except NameError:  # annotations that exist for type checkers alone
        parameters = inspect.signature(constructor).parameters.values()
    kinds = {
        each.name: Any if each.annotation is each.empty or isinstance(each.annotation, str) else each.annotation
        for each in parameters
        if each.kind not in {each.VAR_KEYWORD, each.VAR_POSITIONAL}
    }
    return kinds, any(each.kind is each.VAR_KEYWORD for each in parameters)
