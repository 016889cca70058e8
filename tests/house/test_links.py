"""Every relative link, anchor and file name in the project's pages leads to something. Nothing is asked of a network."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
#: Folders at the top that are no part of the repository: environments, caches, what commands write.
OUTSIDE = {"build", "compare", "data", "dist", "outputs", "runs", "samples", "site", "wandb"}
PAGES = [
    page
    for page in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
    and page.relative_to(ROOT).parts[0] not in OUTSIDE
]
#: Pages that tell how things were: files they name may have moved since.
HISTORY = {"docs/log.md", "docs/log-archive.md", "tests/golden/README.md"}
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def prose(page):
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def links(text):
    """Targets of [text](target) and ![text](target)."""
    return re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", text)


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def problems_of_links(page):
    """Every relative link of a page that leads nowhere, or out of the repository."""
    found = []
    for target in links(prose(page)):
        if re.match(r"[a-z]+:", target):
            if not target.startswith("https://"):
                found.append(f"{target}: not https")
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.is_relative_to(ROOT) or not there.exists():
            found.append(f"{target}: there is no such file")
        elif anchor and (there.suffix != ".md" or anchor not in anchors(there.read_text(encoding="utf-8"))):
            found.append(f"{target}: there is no such heading")
    return found


def problems_of_files(page):
    """Every file of the repository that a page names in `backticks` and that is not there.

    A name counts if it begins with one of the repository's folders, or ends in .py; NAME and * stand for anything.
    """
    found = []
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page)):
        if not re.fullmatch(r"[\w./*-]+", span) or not (
            (span.split("/")[0] in FOLDERS and "/" in span) or ".py" in span
        ):
            continue
        if span.split("/")[0] in OUTSIDE and not span.endswith(".py"):
            continue
        pattern = re.sub(r"\b[A-Z]{2,}\b", "*", span).rstrip("/")
        places = [place for place in (ROOT, page.parent) if pattern and any(place.glob(pattern))]
        if not places:
            found.append(span)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    assert problems_of_links(page) == []


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in HISTORY], ids=name_of)
def test_files_named(page):
    assert problems_of_files(page) == []


def test_every_page_is_checked():
    assert {"README.md", "CONTRIBUTING.md", "docs/numerics.md", "launch/README.md"} <= {name_of(page) for page in PAGES}


def test_broken_links(tmp_path, monkeypatch):
    """The checker finds a dead file, a dead anchor, http, a link out of the project, and a dead name in backticks."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# Some words, twice\n## Some words, twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[a](other.md#some-words-twice) [b](other.md#some-words-twice-1) [c](#a-page) [d](https://x.org/y)\n"
        "![e](missing.png) [f](other.md#nowhere) [g](http://x.org) [h](../out.md) `missing.py` `wantrain/gone.yaml`\n"
        "```\n[i](in/code.md) `gone.py`\n```\n"
    )
    assert [problem.partition(":")[0] for problem in problems_of_links(page)] == [
        "missing.png", "other.md#nowhere", "http", "../out.md"
    ]  # fmt: skip
    assert problems_of_files(page) == ["missing.py", "wantrain/gone.yaml"]
