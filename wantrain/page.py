"""Self-contained HTML pages: text in any script, embedded pictures, videos as files beside the page; no network.

A page is built from pieces. A piece of type Html is markup; a plain str is text and is always escaped, so a caption
cannot become markup. A content security policy limits a page to its inline style, script and pictures and to files
beside it, so that a browser requests nothing else.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

_RULES = (
    "default-src 'none'; img-src data: 'self' file:; media-src 'self' file:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
_STYLE = """
:root { color-scheme: light dark; --quiet: #777; --line: #8884; --bar: #4a90d9; }
body { font: 15px/1.45 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; margin: 2em auto; max-width: 1200px;
       padding: 0 1em; }
h1 { font-size: 1.5em; }
h2 { font-size: 1.15em; margin-top: 2em; border-top: 1px solid var(--line); padding-top: .8em; }
p { margin: .4em 0; } .quiet, figcaption + figcaption, video + figcaption { color: var(--quiet);
       font-size: .87em; }
.row { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; margin: .6em 0; }
figure { margin: 0; max-width: 100%; } figcaption { font-size: .92em; overflow-wrap: anywhere; }
video { width: 320px; max-width: 100%; background: #000; display: block; }
.small video { width: 160px; } img { max-width: 100%; display: block; }
table { border-collapse: collapse; } td, th { padding: .15em .9em .15em 0; text-align: left; vertical-align: top;
       overflow-wrap: anywhere; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
svg text { font-size: 11px; fill: currentColor; } svg rect { fill: var(--bar); }
button { font: inherit; padding: .3em .9em; } summary { cursor: pointer; color: var(--quiet); }
"""
#: Videos play while in view; the button restarts all of them together.
_SCRIPT = """
const videos = [...document.querySelectorAll("video")];
const watch = new IntersectionObserver(changes => changes.forEach(change =>
  change.isIntersecting ? change.target.play().catch(() => {}) : change.target.pause()));
videos.forEach(video => watch.observe(video));
function together() { videos.forEach(video => { video.currentTime = 0; }); }
"""


class Html(str):
    """Markup, not text."""


@dataclass(frozen=True)
class Shown:
    """One video of a page: its path relative to the page, a label above and notes below."""

    video: str
    label: str
    notes: str = ""


@dataclass(frozen=True)
class Row:
    """Videos side by side: a heading (such as a prompt), a note, the videos, and smaller ones in a fold."""

    heading: str
    note: str
    shown: Sequence[Shown]
    more: Sequence[Shown] = ()
    more_title: str = ""
    picture: Html = field(default=Html())


def element(name: str, *pieces: str, **attributes: str | int) -> Html:
    """`<name attributes>pieces</name>`, text and attributes escaped; `class_` stands for class."""
    written = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    inside = "".join(piece if isinstance(piece, Html) else html.escape(piece) for piece in pieces)
    return Html(f"<{name}{written}>{inside}</{name}>")


def page(title: str, *pieces: str, content_key: str = "") -> str:
    """A whole page; `content_key` is stored in its head (see `content_key_of`)."""
    metas = {
        'http-equiv="Content-Security-Policy"': _RULES,
        'name="viewport"': "width=device-width",
        'name="content-key"': content_key,
    }
    head = "".join(f'<meta {which} content="{html.escape(content)}">' for which, content in metas.items())
    together = element("p", element("button", "all from the start", onclick="together()"))
    videos = Html("") if not any("<video" in piece for piece in pieces) else together
    body = element("h1", title, dir="auto") + videos + "".join(map(_piece, pieces))
    script = Html(f"<script>{_SCRIPT}</script>" if videos else "")
    return (
        f'<!doctype html>\n<html><head><meta charset="utf-8">{head}'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>{body}\n{script}</body></html>\n"
    )


def content_key_of(document: str) -> str:
    """The content key of a page that `page` made; empty for anything else."""
    _, found, rest = document[:4096].partition('<meta name="content-key" content="')
    return html.unescape(rest.partition('"')[0]) if found else ""


def section(title: str, *pieces: str) -> Html:
    """A heading and what belongs to it."""
    return Html(element("h2", title, dir="auto") + "".join(_piece(piece) for piece in pieces))


def paragraph(text: str, *, quiet: bool = False) -> Html:
    """A paragraph that runs the way its script does."""
    return element("p", text, dir="auto", **({"class_": "quiet"} if quiet else {}))


def table(head: Sequence[str], rows: Iterable[Sequence[str | int | float]]) -> Html:
    """A table; numbers are right-aligned."""
    lines = [element("tr", *(element("th", name) for name in head))]
    for row in rows:
        lines.append(element("tr", *(_cell(value) for value in row)))
    return element("table", *lines)


def bars(title: str, counts: Mapping[str, float], *, note: str = "") -> Html:
    """A bar chart as inline SVG: a labelled bar for each entry, its length proportional to the value."""
    most = max(counts.values(), default=0) or 1
    left, full, height = 150, 420, 18
    drawn = [
        Html(
            f'<text x="{left - 6}" y="{height * i + 13}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="{left}" y="{height * i + 3}" width="{full * value / most:.1f}" height="{height - 5}"></rect>'
            f'<text x="{left + full * value / most + 5:.1f}" y="{height * i + 13}">{value:,.10g}</text>'
        )
        for i, (name, value) in enumerate(counts.items())
    ]
    chart = element("svg", *drawn, width=left + full + 80, height=height * len(counts), role="img")
    return element("figure", element("figcaption", title), chart, element("figcaption", note))


def picture(jpeg: bytes, alt: str = "") -> Html:
    """A JPEG inside the page."""
    data = base64.b64encode(jpeg).decode()
    return Html(f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(alt)}" loading="lazy">')


def figure(inside: Html, caption: str, notes: str = "") -> Html:
    """A picture with its caption below."""
    captions = [element("figcaption", words, dir="auto") for words in (caption, notes) if words]
    return element("figure", inside, *captions)


def comparison(rows: Iterable[Row]) -> Html:
    """Rows of videos to compare side by side."""
    return Html("".join(_row(row) for row in rows))


def _row(row: Row) -> Html:
    side_by_side = element("div", *(_video(shown) for shown in row.shown), class_="row")
    older = Html("")
    if row.more:
        small = element("div", *(_video(shown) for shown in row.more), class_="row small")
        older = element("details", element("summary", row.more_title), small)
    return section(row.heading, paragraph(row.note, quiet=True), side_by_side, row.picture, older)


def _video(shown: Shown) -> Html:
    flags = " muted loop playsinline controls preload=metadata"
    clip = Html(f'<video src="{html.escape(quote(shown.video))}"{flags}></video>')
    return figure(Html(element("figcaption", shown.label, dir="auto") + clip), shown.notes)


def _cell(value: str | int | float) -> Html:
    if isinstance(value, str):
        return element("td", value, dir="auto")
    return element("td", f"{value:,.10g}", class_="number")


def _piece(piece: str) -> Html:
    return piece if isinstance(piece, Html) else paragraph(piece)
