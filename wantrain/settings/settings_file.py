"""The settings file: one YAML file for all commands, `config=FILE`, whose settings stand before the command line's.

    model: tiny                       # for every command
    run: mine                         # for those that know runs
    shard: {source: clips, out: data/mine/videos}
    train:
      data.shards: data/mine/latents
      optimizer: {lr: 1e-4}           # or optimizer.lr: 1e-4

Each command takes its own section. A key is what stands before the = on a command line, a value what stands after it:
YAML's own readings (off as false, 1e-4 as text) do not apply.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from wantrain.settings.schema import COMMANDS, PATH_KEYS, TEXT_KEYS
from wantrain.settings.words import expanded, is_sweep

#: Settings that may stand above the sections, and the commands that take them from there.
SHARED: Mapping[str, tuple[str, ...]] = {
    "model": tuple(name for name, keys in COMMANDS.items() if "model.name" in keys),
    "weights": ("caption", "encode", "train"),
    "run": ("train", "sample", "export"),
    "runs": ("train", "sample", "export"),
}
#: Settings of which one stands in the other's place: where one is typed, the file's other is left out.
INSTEAD = (
    {"prompt", "prompts"},
    {"steps", "epochs"},
    {"batch_size", "batch_tokens"},
    {"preserve.prompt", "preserve.prompts"},
)
#: Inside a list or a mapping, text of these signs needs no quotes for Hydra.
_BARE = re.compile(r"[\w./+-]*")


class FromFile(NamedTuple):
    """A settings file and the words of a command line that stand for its settings."""

    path: Path
    words: list[str]


def taken_out(words: Sequence[str], command: str) -> tuple[list[str], FromFile | None]:
    """The words of a command line without config=FILE, every shorthand replaced, and that file's settings for the
    command; None without a file. A setting that is typed too is left out of the file's.

    ValueError if the file cannot be read or is no settings file.
    """
    files = [word.partition("=")[2] for word in words if word.startswith("config=")]
    typed = expanded(word for word in words if not word.startswith("config="))
    if not files:
        return typed, None
    if len(files) > 1:
        raise ValueError(f"config= is given {len(files)} times; give one settings file")
    path = Path(files[0]).expanduser()
    settings = read(path, command)
    if is_sweep(words):  # there a comma separates values, and quotes keep it
        settings = {key: _kept_whole(key, value) for key, value in settings.items()}
    taken = {_key(word) for word in typed}
    taken |= {key for either in INSTEAD if either & taken for key in either}
    own = expanded(f"{key}={value}" for key, value in settings.items())
    return typed, FromFile(path, [word for word in own if _key(word) not in taken])


def read(path: Path, command: str) -> dict[str, str]:
    """The settings that a file has for a command, as text, by key: the shared ones, then those of its section.

    ValueError for a file that is not there or no YAML, and for a section or setting, of any command, that there is not.
    """
    sections = _parsed(path)
    for name, value in sections.items():
        if name in COMMANDS:
            _check_section(path, name, value)
        elif name not in SHARED:
            _refuse(path, name, [*COMMANDS, *SHARED], "is no command and no setting that all commands share")
    shared = {key: value for key, value in sections.items() if command in SHARED.get(key, ())}
    return dict(_flat({**shared, **(sections.get(command) or {})}, "", command))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"config={path} cannot be read ({error.strerror}); python shard.py init=FOLDER writes a settings file"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config={path} is no text in UTF-8 ({error})") from error
    loader = _Loader(text)
    try:
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"config={path} is no YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"config={path} holds no settings; write a section of each command (train:) and key: value")
    return content


class _Loader(yaml.BaseLoader):
    """Reads every value as the text that it is written as; a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=True)
        return mapping


def _check_section(path: Path, command: str, section: Any) -> None:
    """ValueError for a section that is no mapping, and for a setting whose first part the command does not know."""
    if section == "":
        return
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {command}: {section} is no section; write key: value below {command}:")
    existing = list(dict.fromkeys(key.split(".")[0] for key in COMMANDS[command])) + ["recipe"] * (command == "train")
    for key in section:
        if key.lstrip("+").split(".")[0] not in existing:
            _refuse(
                path, f"{command}.{key}", [f"{command}.{each}" for each in existing], f"is no setting of {command}.py"
            )


def _refuse(path: Path, key: str, existing: Sequence[str], why: str) -> None:
    nearest = difflib.get_close_matches(key, existing, n=1, cutoff=0.6)
    hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(existing)}"
    raise ValueError(f"{path}: {key} {why}{hint}")


def _flat(settings: Mapping[str, Any], prefix: str, command: str) -> Iterator[tuple[str, str]]:
    """Each setting by its dotted key, with its value as it would be typed. A mapping is the keys below, but for an
    object and for what takes a mapping as its value.
    """
    keys = COMMANDS[command]
    for name, value in settings.items():
        key = f"{prefix}{name}"
        is_group = isinstance(value, dict) and "_target_" not in value
        if is_group and value and any(other.startswith(f"{key.lstrip('+')}.") for other in keys):
            yield from _flat(value, f"{key}.", command)
        elif value == "" and key not in TEXT_KEYS:
            yield key, "null"
        else:
            yield key, _typed(value, quotes=key not in PATH_KEYS)


def _typed(value: Any, *, quotes: bool, inside: bool = False) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{key}: {_typed(each, quotes=quotes, inside=True)}" for key, each in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(_typed(each, quotes=quotes, inside=True) for each in value) + "]"
    text = str(value)
    if not inside or not quotes or _BARE.fullmatch(text):
        return text
    return '"' + re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + ("\\" if found[2] else "") + found[2], text) + '"'


def _kept_whole(key: str, value: str) -> str:
    """The value of a text or path as one value of a sweep."""
    if key not in TEXT_KEYS | PATH_KEYS or "," not in value:
        return value
    return f'"{value}"' if '"' not in value else f"'{value}'"


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")
