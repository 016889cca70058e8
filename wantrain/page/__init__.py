"""Pages in one file: Jinja2 templates with their style, scripts and data inside; videos are files beside the page.

Templates escape every value, and scripts write text as text, so that a caption cannot become markup. The content
security policy of a page allows exactly the scripts that `render` put there, by their hashes, and files beside the
page; a browser requests nothing else. Charts are drawn by uPlot (assets/uplot, MIT).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_FOLDER = Path(__file__).parent
_POLICY = (
    "default-src 'none'; img-src data:; media-src 'self' file:; frame-src 'self' file:; style-src 'unsafe-inline'; "
    "script-src {scripts}"
)
_DATA = '<script type="application/json" id="data">'


def render(
    template: str, title: str, *, data: Mapping[str, Any] | None = None, content_key: str = "", **values: Any
) -> str:
    """A page: `template` (of templates/, without its ending) with `values`, and `data` for its scripts as JSON.

    Numbers in `data` that are not finite become null. `content_key` is stored in the head (see `content_key_of`).
    """
    scripts = [_asset(name) for name in _SCRIPTS[template]]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts) or "'none'"
    style = "\n".join(_asset(name) for name in _STYLES)
    return (
        _environment()
        .get_template(f"{template}.html.j2")
        .render(
            title=title,
            policy=_POLICY.format(scripts=allowed),
            style=Markup(style),
            scripts=[Markup(script) for script in scripts],
            data=None if data is None else _finite(data),
            content_key=content_key,
            **values,
        )
    )


#: Files of assets/ that a template's scripts are, in their order, and the style of every page.
_SCRIPTS: Mapping[str, Sequence[str]] = {
    "captions": ["format.js", "captions.js"],
    "gallery": ["videos.js"],
    "pairs": ["format.js", "videos.js", "pairs.js"],
    "report": ["format.js", "report.js"],
    "run": [
        "uplot/uPlot.iife.min.js",
        "format.js",
        "videos.js",
        "charts.js",
        "heatmap.js",
        "samples.js",
        "inspector.js",
        "run_view.js",
        "run_summary.js",
        "run_learning.js",
        "run_trouble.js",
        "run_cost.js",
        "run.js",
    ],
    "runs": ["uplot/uPlot.iife.min.js", "format.js", "charts.js", "runs.js"],
}
_STYLES = (
    "uplot/uPlot.min.css",
    "page.css",
    "charts.css",
    "videos.css",
    "tables.css",
    "captions.css",
    "pairs.css",
    "narrow.css",
)


def content_key_of(document: str) -> str:
    """The content key of a page that `render` made; empty for anything else."""
    _, found, rest = document[:4096].partition('<meta name="content-key" content="')
    return html.unescape(rest.partition('"')[0]) if found else ""


def data_of(document: str) -> dict[str, Any] | None:
    """The data of a page that `render` made; None where it has none."""
    _, found, rest = document.partition(_DATA)
    if not found:
        return None
    data = json.loads(rest.partition("</script>")[0])
    return data if isinstance(data, dict) else None


def data_uri(jpeg: bytes) -> str:
    """A JPEG as an address of its own, for a picture inside a page."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@functools.cache
def _asset(name: str) -> str:
    return (_FOLDER / "assets" / name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"address": quote, "number": in_words, "json": partial(json.dumps, ensure_ascii=False)}
    return environment


def in_words(value: str | float) -> str:
    """A number with its thousands apart; text as it is."""
    return value if isinstance(value, str) else f"{value:,.10g}"


def _finite(value: Any) -> Any:
    """Plain data with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
