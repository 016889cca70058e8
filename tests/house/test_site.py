"""The documents as a site: it builds without a warning, asks nothing of a network, and shows what it should."""

import importlib
import re

import pytest
from site_build import build_site

#: What a browser fetches by itself to show a page; links that a person may follow are no part of it.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']([^"']+)|<link\b[^>]*\bhref=["']([^"']+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site in a folder of its own."""
    return build_site(tmp_path_factory.mktemp("site"))


def test_pages_fetch_nothing(site):
    """No page or style names a script, picture, style or font of another place."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        fetched = [one or other for one, other in FETCHED.findall(page.read_text(encoding="utf-8"))]
        outside = [target for target in fetched if re.match(r"(?:[a-z]+:)?//", target)]
        assert outside == [], page.relative_to(site)
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"';]+", text) == [], style.relative_to(site)


def test_pages_are_there(site):
    """Pages from all over the repository, their links led to each other."""
    for page in ("index", "log", "log-archive", "launch/index", "benchmarks/index", "CONTRIBUTING", "source/conf"):
        assert (site / f"{page}.html").is_file(), page
    launch = (site / "launch/index.html").read_text(encoding="utf-8")
    assert 'href="../numerics.html#engines"' in launch
    assert 'href="source/wantrain/flow.py.html"' in (site / "architecture.html").read_text(encoding="utf-8")
    assert "sigma_quantiles" in (site / "source/wantrain/flow.py.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["losses", "models", "data", "sampling"])
def test_api_is_whole(site, package):
    """The page of a package shows whatever it exports that says what it is."""
    module = importlib.import_module(f"wantrain.{package}")
    page = (site / "api" / f"{package}.html").read_text(encoding="utf-8")
    shown = {anchor.rpartition(".")[2] for anchor in re.findall(r'<h2 id="([\w.]+)"', page)}
    assert set(module.__all__) - shown <= {name for name in module.__all__ if not getattr(module, name).__doc__}
