"""The site of the documents in headless Chromium, opened from a disk."""

import pytest
from site_build import build_site


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_search_from_a_disk(show, tmp_path, width, scheme):
    """The search finds words and leads to the page, without a server or a network; no page is wider than the screen."""
    tab = show(build_site(tmp_path) / "memory.html", width=width, scheme=scheme)
    tab.keyboard.press("/")
    tab.keyboard.type("holdout", delay=20)
    found = tab.locator(".md-search-result__link").first
    found.wait_for(timeout=15_000)
    assert "holdout" in tab.locator(".md-search-result__list").inner_text().lower()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    found.click()
    tab.wait_for_url(lambda address: "memory.html" not in address)
