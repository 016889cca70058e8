"""shard.py init=: the look at a folder, in words, and the settings file that all commands take."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from wantrain import geometry
from wantrain.data.advice.advice import Advice, Places, Setting, advise
from wantrain.data.advice.overview import Overview, survey_source
from wantrain.data.footage.decode_workers import DecodeOptions
from wantrain.data.footage.scenes import library
from wantrain.util.console import say
from wantrain.util.files import naming

#: Text that YAML reads as it is written, and as text.
_PLAIN = re.compile(r"[\w./~-]([\w ,./+=()~-]*[\w./)~-])?")
_WIDTH = 110


def write_settings(
    source: Path, file: Path, model: Mapping[str, Any], sizes: geometry.Buckets, decode: DecodeOptions
) -> None:
    """Look at the footage in `source`, print what it holds and what fits it, and write that as a settings file.

    model  the model's facts (conf/model)
    sizes  the buckets that encode.py has for it by default

    Surveys of the files stay in the folder that the file gives shard.py, which then decodes nothing again. ValueError
    if the file is there already, or `source` is no folder of footage.
    """
    check_file(file)
    if not source.is_dir():
        raise ValueError(f"init={source} is no folder; give the folder that holds the videos and images")
    if Path.cwd().resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"init={source} holds the current folder, so data/ and runs/ would lie among the footage; go elsewhere"
        )
    places = Places(file)
    overview = survey_source(source, places.videos, split=_can_split(), decode=decode)
    advice = advise(overview, model, sizes, places)
    _say(overview, advice, model)
    text = settings_text(advice.settings, source, model["name"])
    with naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    caption = ["caption.py"] if overview.without else []
    say(f"wrote {file}: edit what you like, then")
    for command in [*caption, "shard.py", "encode.py", "train.py", "sample.py", "export.py"]:
        say(f"  python {command} config={file}")
    say(f"runs/{places.name}/index.html shows the training while it goes on")


def settings_file_of(source: str, out: str | None) -> Path:
    """The settings file for a folder: `out`, or the folder's name in the current folder. ValueError for another
    ending than .yaml.
    """
    if out is None:
        name = re.sub(r"[^\w=-]+", "_", Path(source).absolute().name).strip("_-") or "footage"
        return Path(f"{name}.yaml")
    if Path(out).suffix not in {".yaml", ".yml"}:
        raise ValueError(f"out={out} must end in .yaml: with init= it names the settings file that is written")
    return Path(out)


def check_file(file: Path) -> None:
    """ValueError if a settings file is there already: it may have been edited."""
    if file.exists():
        raise ValueError(
            f"{file} is there already, and is never overwritten; remove it, or give another name: out=OTHER.yaml"
        )


def _can_split() -> bool:
    try:
        library()
    except ValueError:  # scene detection is an extra; the advice says that it is missing
        return False
    return True


def _say(overview: Overview, advice: Advice, model: Mapping[str, Any]) -> None:
    for line in overview.lines():
        say(line)
    say(f"advice for model={model['name']}:")
    for setting in advice.settings:
        if setting.why and setting.command in {"shard", "encode", "train"}:
            say(f"  {setting} ({setting.why})")
    say("with these settings:")
    for line in advice.stats.summary():
        say(f"  {line}")
    if advice.trouble:
        say("likely trouble:")
    for line in advice.trouble:
        say(f"  {line}")


def settings_text(settings: Sequence[Setting], source: Path, model: str) -> str:
    """The settings as YAML, a section for each command, with the reasons as comments."""
    lines = [
        f"# Settings for the footage in {source}, made by: python shard.py init={source} model={model}",
        "# Each command takes its section: python shard.py config=FILE. A key is what stands before the = on a command",
        "# line; what is typed there wins. docs/configuration.md lists all settings.",
    ]
    for command, group in groupby(settings, key=lambda each: each.command):
        indent = "  " if command else ""
        lines += ["", f"{command}:"] if command else [""]
        for _, key, value, why in group:
            if why:
                lines += [f"{indent}# {line}" for line in textwrap.wrap(why, _WIDTH)]
            lines.append(f"{indent}{key}: {_yaml(value)}")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(each) for each in value) + "]"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
