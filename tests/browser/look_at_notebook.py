"""Results in notebooks, in a real browser: JupyterLab, and a page exported from it. Part of `make browser`.

`LAB` names the folder of the programs of an environment with JupyterLab and nbconvert that sees this package.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Frame, Page, sync_playwright

from tests.browser.look_at_report import chromium

LAB = Path(os.environ.get("LAB", ".venv/lab/bin")).absolute()
CELLS = [
    "import cutaway as ca\nmodel = ca.load('miniworld')",
    "ca.lenses.lens_grid(model, ['The capital of Norway is'])",
    "ca.lenses.direct_attribution(model, ca.tasks.load('ioi', model, 1))",
    "ca.lenses.logit_lens(model, ca.tasks.load('facts', model, 2), samples=1)",
]
PICTURES = len(CELLS) - 1
KERNEL = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
STILL = "() => ![...document.querySelectorAll('.jp-InputPrompt')].some(e => e.textContent.includes('*'))"
FITS = "() => document.documentElement.scrollHeight === innerHeight"  # asked by time: unseen frames draw nothing
CUT = (
    "() => [...document.querySelectorAll('th')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
)


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> Path:
    """A folder with a notebook that was not run, the same one run elsewhere, and the page that was exported of it."""
    folder = tmp_path_factory.mktemp("books")
    rest = {"metadata": {}, "outputs": [], "execution_count": None}
    cells = [{"cell_type": "code", "id": f"c{n}", "source": text, **rest} for n, text in enumerate(CELLS)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = {"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": cells}
    (folder / "new.ipynb").write_text(json.dumps(book), "utf-8")
    convert = [str(LAB / "jupyter"), "nbconvert", "--log-level=ERROR"]
    subprocess.run([*convert, "--to=notebook", "--execute", "new.ipynb", "--output=run"], cwd=folder, check=True)
    own = ["--HTMLExporter.mathjax_url=", "--HTMLExporter.require_js_url="]  # the template's own requests
    subprocess.run([*convert, "--to=html", "run.ipynb", *own], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def lab(books) -> Iterator[str]:
    """The address of a JupyterLab in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {
        f"{n}_DIR": str(books / ".conf") for n in ("JUPYTER_CONFIG", "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES")
    }
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=", "--expose-app-in-browser"]
    command = [str(LAB / "jupyter"), "lab", "--log-level=ERROR", *options]
    with subprocess.Popen(command, cwd=books, env=os.environ | places) as server:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        server.terminate()


@contextmanager
def visited(browser: Browser, address: str, own: str, **options: Any) -> Iterator[Page]:
    """A visit of a page that must complain of nothing and ask no one but its own server."""
    page = browser.new_context(viewport={"width": 1280, "height": 4200}, **options).new_page()
    complaints, foreign = list[str](), list[str]()
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((own, "blob:", "data:")) else foreign.append(r.url))
    page.goto(address)
    yield page
    assert not complaints
    assert not foreign
    page.context.close()


def frames(page: Page) -> list[Frame]:
    """The frames of results, when each fits what it holds."""
    page.wait_for_function(f"() => document.querySelectorAll('iframe[srcdoc]').length === {PICTURES}", timeout=60_000)
    found = [handle.content_frame() for handle in page.query_selector_all("iframe[srcdoc]")]
    for frame in found:
        assert frame is not None
        frame.wait_for_function(FITS, polling=100)
    return [f for f in found if f is not None]


def looked_at(page: Page, dark: bool) -> None:
    """Look at the frames: labels are whole, the theme is that of the text around, tips come, folds have room."""
    found = frames(page)
    for frame in found:
        frame.wait_for_function("t => document.body.dataset.theme === t", arg="dark" if dark else "light", polling=100)
        assert frame.locator("figure").count() >= 1
        assert frame.evaluate(CUT) == []
        assert frame.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    first = found[0]
    first.locator("td[data-tip]").first.hover()
    assert "layer" in first.locator("#tip").inner_text()
    before = first.evaluate("innerHeight")
    first.locator("summary", has_text="How computed").click()
    first.wait_for_function("before => innerHeight > before", arg=before, polling=100)
    first.wait_for_function(FITS, polling=100)
    first.locator("summary", has_text="How computed").click()


def test_jupyterlab_shows_results_in_both_themes(browser, lab):
    with visited(browser, f"{lab}/lab/tree/new.ipynb", lab) as page:
        page.wait_for_function(KERNEL, timeout=60_000)
        do = "([name, values]) => { window.jupyterapp.commands.execute(name, values); }"
        page.evaluate(do, ["notebook:run-all-cells", {}])
        page.wait_for_function(STILL, timeout=120_000)
        for theme in ("Light", "Dark"):
            page.evaluate(do, ["apputils:change-theme", {"theme": f"JupyterLab {theme}"}])
            looked_at(page, theme == "Dark")


def test_a_notebook_that_is_not_trusted_says_how_to_see_them(browser, lab):
    with visited(browser, f"{lab}/lab/tree/run.ipynb", lab) as page:
        page.wait_for_selector("text=run the cell, or trust the notebook", timeout=60_000)
        assert page.locator(".jp-OutputArea iframe").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_exported_page_shows_results_and_asks_for_nothing(browser, books, scheme):
    with visited(browser, (books / "run.html").as_uri(), (books / "run.html").as_uri(), color_scheme=scheme) as page:
        looked_at(page, dark=False)  # the page itself is light
