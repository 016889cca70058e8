"""What the site has besides the pages of docs/: pages from elsewhere in the repository, files that are linked, the API.

A page of the navigation that docs/ does not have is found by its path in the repository, or, below api/, made from the
docstrings of that package. A link to any other file of the repository leads to a page that shows it. In the repository
the links stay as GitHub takes them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: Where the site shows files of the repository that are no pages.
SOURCE = "source"
#: Pages that tell how things were: the search names them last.
HISTORY = ("log.md", "log-archive.md")
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
_FENCES = re.compile(r"(^```.*?^```[^\n]*$)", flags=re.M | re.S)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".toml": "toml"}


def on_config(config: MkDocsConfig) -> None:
    """Folders of the navigation become the page that shows their files."""
    config.nav = _with_pages(config.nav)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the navigation that lie outside docs/, and every file that a page links to."""
    for uri in _uris(config.nav):
        if uri.startswith("api/"):
            files.append(File.generated(config, uri, content=_api(Path(uri).stem)))
        elif not uri.startswith(f"{SOURCE}/") and files.get_file_from_path(uri) is None and (ROOT / uri).is_file():
            files.append(File.generated(config, uri, content=(ROOT / uri).read_text(encoding="utf-8")))
    shown = {uri for uri in _uris(config.nav) if uri.startswith(f"{SOURCE}/")}
    for file in files.documentation_pages():
        if not file.src_uri.startswith("api/"):
            linked = (_on_site(target, file, files) for _, target in _LINK.findall(file.content_string))
            shown |= {uri for uri in linked if uri.startswith(f"{SOURCE}/")}
    for uri in sorted(shown):
        files.append(File.generated(config, uri, content=_source(uri.removeprefix(f"{SOURCE}/").removesuffix(".md"))))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links from file to file of the repository into links from page to page of the site."""

    def turned(match: re.Match[str]) -> str:
        uri = _on_site(match[2], page.file, files)
        if not uri:
            return match[0]
        _, _, anchor = match[2].partition("#")
        there = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}({there}{'#' + anchor if anchor else ''})"

    if page.file.src_uri in HISTORY:
        page.meta["search"] = {"boost": 0.1}
    if page.file.src_uri.startswith((f"{SOURCE}/", "api/")):
        return markdown
    pieces = _FENCES.split(markdown)
    return "".join(piece if piece.startswith("```") else _LINK.sub(turned, piece) for piece in pieces)


def _on_site(target: str, file: File, files: Files) -> str:
    """Where in the site a relative link of a page leads; empty for an address and an anchor of the page itself."""
    path = target.partition("#")[0]
    if not path or re.match(r"[a-z]+:", path):
        return ""
    own = file.src_uri if file.generated_by else f"docs/{file.src_uri}"
    there = posixpath.normpath(posixpath.join(posixpath.dirname(own), path))
    uri = there.removeprefix("docs/")
    known = files.get_file_from_path(uri) is not None or not (ROOT / there).exists()
    return uri if known else f"{SOURCE}/{there}.md"


def _with_pages(nav: Any) -> Any:
    """The navigation with the page of a folder in the folder's place."""
    if isinstance(nav, list):
        return [_with_pages(entry) for entry in nav]
    if isinstance(nav, dict):
        return {title: _with_pages(entry) for title, entry in nav.items()}
    return f"{SOURCE}/{nav}.md" if (ROOT / nav).is_dir() else nav


def _uris(nav: Any) -> Iterator[str]:
    """The pages that the navigation names."""
    for entry in nav if isinstance(nav, list) else nav.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from _uris(entry)


def _api(package: str) -> str:
    """The page of a package: its docstring, and what it offers.

    What is named as the module that it comes from is asked for by its full name: the module would stand for it.
    """
    own = ROOT / "wantrain" / package / "__init__.py"
    text = own.read_text(encoding="utf-8") if own.is_file() else ""
    hidden = re.findall(rf"^from (wantrain\.{package}\.(\w+)) import (?:.*\b)?\2\b", text, flags=re.M)
    more = [f"::: {module}.{name}\n    options:\n      show_root_heading: true\n" for module, name in hidden]
    return "\n".join([f"# wantrain.{package}\n", f"::: wantrain.{package}\n", *more])


def _source(path: str) -> str:
    """A page that shows a file of the repository, or every file of a folder; search passes it over."""
    there = ROOT / path
    found = [each for each in sorted(there.rglob("*")) if each.suffix in _LANGUAGES] if there.is_dir() else [there]
    parts = ["---\nsearch:\n  exclude: true\n---", f"# `{path}`"]
    for file in found:
        if file != there:
            parts.append(f"## {file.relative_to(ROOT).as_posix()}")
        parts.append(f"`````{_LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}`````")
    return "\n\n".join(parts) + "\n"
