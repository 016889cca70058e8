"""Docstrings for the site: plain text with tables of names becomes Markdown that reads the same."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: A line of a table: one name or several, two spaces or more, what they are.
_ROW = re.compile(r"(\w+(?:, \w+)*) {2,}(\S.*)")
_CODE = re.compile(r"(`[^`]*`)")
#: Words between two stars are emphasised; all other stars are products and powers.
_EMPHASIS = re.compile(r"(?<!\S)\*([A-Za-z][^*]*[A-Za-z])\*(?=[\s.,;:)]|$)")


class PlainDocstrings(griffe.Extension):
    """Turns every docstring that is loaded into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """A docstring with its tables as lists, and with signs as they stand."""
    lines: list[str] = []
    in_table = False
    for line in docstring.splitlines():
        row = _ROW.fullmatch(line)
        if row is not None:
            if not in_table and lines and lines[-1]:
                lines.append("")
            lines.append(f"- `{'`, `'.join(row[1].split(', '))}`: {_signs(row[2])}")
            in_table = True
        elif in_table and line.startswith("  "):
            lines.append(f"  {_signs(line.strip())}")
        else:
            if in_table and line:
                lines.append("")
            in_table = False
            lines.append(line if line.startswith("    ") else _signs(line))
    return "\n".join(lines)


def _signs(text: str) -> str:
    """Text in which `<` and the stars of formulas are no markup."""
    parts = _CODE.split(text)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return _EMPHASIS.sub("\0\\1\0", text).replace("*", r"\*").replace("\0", "*").replace("<", "&lt;")
