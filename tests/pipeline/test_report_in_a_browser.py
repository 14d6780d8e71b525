"""The report can be read in a browser, on a phone and on paper."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .project import Project

PAGE = Path("report", "tiny.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's chromium without a window."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_whole(shared: Project, browser: Any, width: int):
    tab = browser.new_page(viewport={"width": width, "height": 800})
    complaints: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto((shared.root / PAGE).as_uri())
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert tab.evaluate("document.compatMode") == "CSS1Compat"  # not the quirks of old pages
    images = tab.evaluate(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(images) >= 5
    assert all(done and natural > 0 and wide > 250 for done, natural, wide in images)
    ends = "e.getBoundingClientRect().right <= innerWidth + 1"
    whole = f"[...document.querySelectorAll('body *')].every(e => e.closest('.wide') || {ends})"
    assert tab.evaluate(whole)  # only what scrolls in its own box is wider
    assert complaints == [] and {url.split(":")[0] for url in requests} <= {"file", "data"}
    tab.close()


def test_it_prints_without_cutting_a_table(shared: Project, browser: Any):
    tab = browser.new_page()
    tab.goto((shared.root / PAGE).as_uri())
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 688, "height": 1000})  # A4 without its margins, at 96 pixels per inch
    assert tab.evaluate("[...document.querySelectorAll('.wide')].every(e => e.scrollWidth <= e.clientWidth)")
    printed: bytes = tab.pdf(prefer_css_page_size=True)
    tab.close()
    assert printed.startswith(b"%PDF-") and len(re.findall(rb"/Type\s*/Page\b", printed)) >= 1
