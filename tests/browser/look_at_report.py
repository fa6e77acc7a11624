"""The report of `explain` in a real browser: `make browser`. Not part of `make test`, which needs no browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from cutaway.cli import app

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str:
    """The browser of the system; `CHROMIUM` names another. Without one this fails: nothing was looked at."""
    found = os.environ.get("CHROMIUM") or next((p for n in NAMES if (p := shutil.which(n))), None)
    assert found is not None, f"no browser found: install one of {', '.join(NAMES)}, or set CHROMIUM"
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report as `explain` writes it, with a name that must be escaped."""
    path = tmp_path_factory.mktemp("report") / "why & how #1.html"
    assert app.main(["explain", "The capital of Norway is", "--effort", "quick", "--html", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        b = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield b
        b.close()


class Visit:
    """A page opened from disk, with everything it asked for and complained about."""

    def __init__(self, browser: Browser, path: Path, **options: Any):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def background(self) -> int:
        """How bright the page is behind its text: 0 to 765."""
        color = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(c) for c in color[color.index("(") + 1 : -1].split(",")[:3])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_from_disk_and_asks_for_nothing(browser, report, scheme):
    with Visit(browser, report, color_scheme=scheme) as v:
        v.page.wait_for_timeout(200)
        assert v.requests == [report.as_uri()]
        assert v.complaints == []
        assert "oslo" in v.page.title()
        assert v.page.locator("section").count() >= 5
        assert (v.background() > 600) == (scheme == "light")
        ink = v.page.evaluate("getComputedStyle(document.querySelector('h1')).color")
        assert (sum(int(c) for c in ink[ink.index("(") + 1 : -1].split(",")[:3]) < 300) == (scheme == "light")


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_no_width_overflows(browser, report, width):
    with Visit(browser, report, viewport={"width": width, "height": 700}) as v:
        wide = v.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width
        assert v.page.evaluate("document.body.scrollWidth") <= width
        for n in range(v.page.locator("section").count()):
            box = v.page.locator("section").nth(n).bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width + 0.5
        for fold in v.page.locator("details > summary").all():
            fold.click()
        assert v.page.evaluate("document.documentElement.scrollWidth") <= width, "with every fold open"
        assert v.complaints == []


def test_the_theme_is_chosen_by_its_button(browser, report):
    with Visit(browser, report, color_scheme="light") as v:
        button, seen = v.page.locator("#theme"), []
        for _ in range(4):
            seen.append((button.inner_text().split()[-1], v.background() > 600))
            button.click()
        assert seen == [("auto", True), ("light", True), ("dark", False), ("auto", True)]
        assert v.complaints == []


def test_tips_answer_to_pointer_and_keys_and_leave(browser, report):
    with Visit(browser, report) as v:
        tip, cells = v.page.locator("#tip"), v.page.locator(".cw-grid [data-tip]")
        assert tip.is_hidden()
        assert cells.count() > 20
        cells.first.scroll_into_view_if_needed()
        cells.first.hover()
        assert tip.is_visible()
        text = tip.inner_text()
        assert any(ch.isdigit() for ch in text)
        box, width = tip.bounding_box(), 1280
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        v.page.keyboard.press("Escape")
        assert tip.is_hidden()
        first = v.page.locator(".cw-grid [tabindex='0']").first
        first.focus()
        v.page.keyboard.press("ArrowRight")
        assert tip.is_visible()
        assert tip.inner_text() != ""
        assert v.page.evaluate("document.activeElement.dataset.tip").split("\n")[0] in tip.inner_text()


def test_every_picture_has_words_for_those_who_do_not_see_it(browser, report):
    with Visit(browser, report) as v:
        silent = v.page.evaluate(
            "[...document.querySelectorAll('[data-tip]')].filter(e => !e.getAttribute('aria-label')).length"
        )
        assert silent == 0
        assert v.page.evaluate("document.documentElement.lang") == "en"
        assert v.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id).length") == v.page.evaluate(
            "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size"
        )


def test_it_can_be_read_without_script(browser, report):
    with Visit(browser, report, java_script_enabled=False) as v:
        assert v.page.locator("#theme").is_hidden()
        assert v.page.locator("section table").count() > 0
        assert "Norway" in v.page.locator("main").inner_text()


def test_contents_lead_to_their_sections(browser, report):
    with Visit(browser, report) as v:
        for link in v.page.locator("nav a").all():
            target = link.get_attribute("href")
            assert target is not None
            assert v.page.locator(target).count() == 1
        v.page.locator("nav a").last.click()
        v.page.wait_for_function("scrollY > 0", timeout=10_000)  # scrolling is smooth: it takes its time


def test_on_paper_everything_is_light_and_fits(browser, report, tmp_path):
    with Visit(browser, report, color_scheme="dark") as v:
        v.page.emulate_media(media="print")
        assert v.background() > 600
        v.page.pdf(path=tmp_path / "r.pdf", format="A4")
        assert (tmp_path / "r.pdf").stat().st_size > 10_000
