"""The studio in a real browser: `make browser`. Not part of `make test`, which needs no browser.

Per screen: what is shown equals what the server says, the console is silent, nothing is asked of another origin, keys
lead through it, and it fits a phone and the dark.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.look_at_report import chromium

PROMPT = "While Kate and Max were at the market, Max passed the book to"
OTHER = PROMPT.replace(", Max", ", Kate")
SELECTED = {"prompt": PROMPT, "target": " Kate", "foil": " Max"}
SCREENS = {
    "why": SELECTED,
    "patch": SELECTED | {"other": OTHER},
    "heads": SELECTED | {"layer": "4", "head": "0"},
    "features": SELECTED,
    "graph": SELECTED,
    "ask": SELECTED | {"method": "lenses.logit_lens"},
    "runs": {},
}
QUIET = "() => document.querySelector('.panel') && !document.querySelector('.busy, [aria-busy=true]')"


def number(text: str) -> float:
    """Return the number that a text begins with, with its sign."""
    return float(text.replace("−", "-").split()[0])


class Visit:
    """A visit of a running studio, with everything the page asked for and complained about."""

    def __init__(self, browser: Browser, address: str):
        self.base = address.split("/?")[0]
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on(
            "request", lambda r: None if r.url.startswith((self.base, "blob:")) else self.foreign.append(r.url)
        )
        self.page.goto(address)
        self.page.wait_for_selector(".top")

    def show(self, screen: str, **values: str) -> Page:
        """Go to a screen and wait until it is quiet."""
        self.page.goto(f"{self.base}/#/{screen}?{urlencode(values, quote_via=quote)}")
        self.page.wait_for_selector(".panel")
        self.page.wait_for_function(QUIET, timeout=60_000)
        return self.page

    def ask(self, action: str, **body: Any) -> Any:
        """Ask the server itself, with the cookie of the page."""
        answer = self.context.request.post(f"{self.base}/api/v1/{action}", data=body)
        assert answer.ok, answer.text()
        return answer.json()

    def ask_for(self, what: str) -> Any:
        """Get what the server tells without a question."""
        answer = self.context.request.get(f"{self.base}/api/v1/{what}")
        assert answer.ok, answer.text()
        return answer.json()


@pytest.fixture(scope="module")
def visit(tmp_path_factory) -> Iterator[Visit]:
    folder = tmp_path_factory.mktemp("studio")
    command = [sys.executable, "-m", "cutaway", "studio", "--no-browser", "--folder", str(folder)]
    command += ["--model", "miniworld=miniworld", "--model", "program=compiled/histogram"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, sync_playwright() as play:
        assert server.stderr is not None
        address = re.search(r"http\S+", server.stderr.readline())
        assert address is not None
        browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        found = Visit(browser, address[0])
        found.page.wait_for_selector(".dot.ready", timeout=60_000)
        yield found
        browser.close()
        server.terminate()


@pytest.mark.parametrize("screen", SCREENS)
def test_a_screen_is_silent_asks_no_one_else_and_fits(visit, screen, tmp_path):
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light")):
        visit.page.set_viewport_size({"width": width, "height": 900})
        visit.page.emulate_media(color_scheme=scheme)
        page = visit.show(screen, **SCREENS[screen])
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        cut = page.evaluate(
            "() => [...document.querySelectorAll('.panel h2, .top a, button')].filter(e => e.offsetParent && "
            "!e.closest('.guesses, .top ul') && e.scrollWidth > e.clientWidth + 2).map(e => e.textContent)"
        )
        assert not cut
        page.screenshot(path=Path(tmp_path) / f"{screen}-{width}-{scheme}.png", full_page=True)
    visit.page.set_viewport_size({"width": 1280, "height": 900})
    visit.page.emulate_media(color_scheme="light")
    assert not visit.complaints
    assert not visit.foreign


def test_a_narrow_window_shows_which_screen_it_is(visit):
    visit.page.set_viewport_size({"width": 390, "height": 900})
    visit.show("why", **SELECTED)
    for screen in ("runs", "why"):
        page = visit.show(screen, **SCREENS[screen])
        expect(page.locator(".top [aria-current]")).to_be_in_viewport(ratio=0.95)
    visit.page.set_viewport_size({"width": 1280, "height": 900})


def test_why_shows_the_servers_number(visit):
    page = visit.show("why", **SELECTED)
    said = visit.ask("predict", prompt=PROMPT, top=8)
    assert page.locator(".guesses b").all_inner_texts() == [g["text"] for g in said["next"]]
    assert "".join(page.locator(".strip .token").all_inner_texts()) == "".join(t["text"] for t in said["tokens"])
    task = {"task": "sentence", "task_sentence": PROMPT, "task_target": " Kate", "task_foil": " Max"}
    shown = visit.ask("run", method="lenses.direct_attribution", values=task)
    data = visit.ask("data", result=shown["id"])
    effect = dict(zip(data["labels"]["component"], data["fields"]["effect"]["values"], strict=True))
    panel = page.locator(".panel", has_text="lenses.direct_attribution")
    best = max(effect, key=lambda c: abs(effect[c]))
    row = panel.locator(".cw-rows tr", has_text=best).first
    assert f"{effect[best]:+.2f}" in row.inner_text().replace("−", "-")
    assert "control" in str(row.get_attribute("data-tip"))


def test_a_click_selects_for_every_screen_and_the_address_keeps_it(visit):
    page = visit.show("why", **SELECTED)
    page.locator(".panel", has_text="lenses.lens_grid").locator("tbody td").nth(20).click()
    assert "layer=" in page.url
    assert "position=" in page.url
    page.locator(".top nav a", has_text="Patch map").click()
    assert "#/patch?" in page.url
    assert "layer=" in page.url
    page.go_back()
    page.wait_for_selector(".panel >> text=lenses.lens_grid")


def test_keys_lead_through_a_picture(visit):
    page = visit.show("why", **SELECTED)
    first = page.locator(".panel", has_text="lenses.lens_grid").locator("[data-tip][tabindex='0']").last
    first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    tip = page.evaluate("() => document.activeElement.dataset.tip")
    assert "layer" in tip
    page.keyboard.press("Enter")
    assert "layer=" in page.url


def test_two_prompts_and_their_difference(visit):
    page = visit.show("why", **SELECTED, other=OTHER, side="A − B")
    panel = page.locator(".panel", has_text="lenses.direct_attribution")
    ids = [
        visit.ask("run", method="lenses.direct_attribution", values={"task": "sentence", "task_sentence": text,
                                                                     "task_target": " Kate", "task_foil": " Max"})["id"]
        for text in (PROMPT, OTHER)
    ]  # fmt: skip
    a, b = (visit.ask("data", result=i)["fields"]["effect"]["values"] for i in ids)
    most = max((x - y for x, y in zip(a, b, strict=True)), key=abs)
    assert f"{most:+.2f}" in panel.locator(".cw-rows tr").first.inner_text().replace("−", "-")


@pytest.fixture(scope="module")
def harvested(visit):
    """A small store of features, harvested by a job."""
    values = {"dictionary": "miniworld/resid_post.3", "tokens": 2000}
    visit.ask("jobs", method="harvest", values=values)
    while visit.ask("stores")["stores"] == []:
        visit.page.wait_for_timeout(200)
    return visit.ask("stores")["stores"][0]["id"]


@pytest.fixture(scope="module")
def traced(visit):
    """Graphs of both prompts."""
    values = {"transcoders": "miniworld/transcoders"}
    found = [visit.ask("run", method="graphs.trace", values={**values, "prompts": p})["id"] for p in (PROMPT, OTHER)]
    visit.page.reload()
    return found


def test_heads_show_two_prompts_and_their_difference(visit):
    page = visit.show("heads", **SELECTED, other=OTHER, layer="4", head="3")
    said = visit.ask("attention", prompt=PROMPT, other=OTHER, layer=4)
    page.locator(".looks .sides button").first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert "side=A" in page.url
    page.locator(".looks .token").nth(10).click()
    (looks,) = [h for h in said["difference"] if h["head"] == 3]
    shown = [number(t) for t in page.locator(".weights.out .amount").all_inner_texts()]
    assert shown == pytest.approx(looks["weights"][10][:6], abs=6e-4)
    page.keyboard.press("ArrowRight")
    shown = [number(t) for t in page.locator(".weights.out .amount").all_inner_texts()]
    assert shown == pytest.approx(looks["weights"][11][:6], abs=6e-4)
    visit.show("heads", **SELECTED, other=f"{OTHER} the", layer="4", head="3", side="A − B")
    assert "do not line up" in page.locator(".looks").inner_text()
    assert not visit.complaints


def test_features_show_two_prompts_and_their_difference(visit, harvested):
    asked = {"other": OTHER, "tab": "prompt", "store": harvested}
    page = visit.show("features", **SELECTED, **asked)
    page.locator(".onprompt tbody tr").nth(11).wait_for()
    page.locator(".latents .sides button", has_text="−").click()
    said = visit.ask("read", store=harvested, text=PROMPT, other=OTHER, top=6, dense=0.1)
    for i, token in enumerate(said["difference"]):
        chips = page.locator(".onprompt tbody tr").nth(i).locator(".chips button").all_inner_texts()
        assert chips == ([] if token["special"] else [str(x["latent"]) for x in token["top"]])
    page = visit.show("features", **SELECTED, **asked, side="B")
    chips = page.locator(".onprompt tbody tr").last.locator(".chips button").all_inner_texts()
    assert chips == [str(x["latent"]) for x in said["other"][-1]["top"]]
    assert not visit.complaints


def test_graphs_of_two_prompts_stand_beside_each_other(visit, traced):
    page = visit.show("graph", **SELECTED, other=OTHER, side="A − B")
    said = visit.ask("compare_graphs", graph=traced[0], other=traced[1])
    rows = page.locator(".changes tbody tr")
    assert rows.count() == len(said["rows"])
    first = said["rows"][0]
    cells = [number(rows.first.locator("td").nth(i).inner_text()) for i in (1, 2, 3)]
    assert cells == pytest.approx([100 * first[n] for n in ("first", "change", "second")], rel=0.05)
    for plot, graph in enumerate(traced):
        nodes = visit.ask("graph", graph=graph)["nodes"]
        assert page.locator(".pair .plot").nth(plot).locator(".mark").count() == len(nodes)
    page.locator(".changes select").select_option("A")
    assert rows.count() == sum(r["second"] is None for r in said["rows"])
    assert not visit.complaints
    assert not visit.foreign


def test_a_circuit_stands_beside_its_curve_and_its_truth(visit):
    asked = {"model": "program", "method": "circuits.exact", "values": {"task": "histogram", "task_n": 4}}
    circuit = visit.ask("run", **asked)["id"]
    page = visit.show("graph", model="program", drawn="circuit")
    said = visit.ask("circuit", model="program", circuit=circuit)
    assert page.locator(".edgelist code").all_inner_texts() == [e["name"] for e in said["edges"]]
    shown = [number(t) for t in page.locator(".edgelist td:nth-child(2)").all_inner_texts()]
    assert shown == pytest.approx([e["weight"] for e in said["edges"]], rel=1e-2)
    assert page.locator(".plotted .mark").count() == len(said["nodes"])
    assert "4 of the 4 edges of the truth" in page.locator(".truth").inner_text()
    slider = page.locator("input[aria-label=Edges]")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(".edgelist .missed")
    assert "size=3" in page.url
    panel = page.locator(".panel", has_text="circuits.faithfulness")
    panel.locator(".cost .main").click()
    panel.locator(".result figure").first.wait_for(timeout=120_000)
    (job,) = [j for j in visit.ask_for("jobs") if j["method"] == "circuits.faithfulness"]
    fields = visit.ask("data", model="program", result=job["result"])["fields"]
    panel.locator("summary", has_text="Numbers").click()
    cells = panel.locator("details[open] table").first.locator("tbody td:nth-child(2)")
    shown = [number(t) for t in cells.all_inner_texts()]
    assert shown == pytest.approx(fields["faithfulness"]["values"], abs=5e-3)
    assert not visit.complaints
    assert not visit.foreign


def test_a_job_shows_its_cost_its_progress_and_its_result(visit):
    page = visit.show("ask", method="patching.ablate", values='{"task":"ioi","task_n":4,"samples":2}')
    choices = page.locator(".form .entries select")
    assert [c.input_value() != "" for c in choices.all()] == [True] * max(1, choices.count())
    page.locator("button", has_text="Plan").click()
    page.wait_for_selector(".cost .soft >> text=forward", timeout=60_000)
    page.locator(".cost button", has_text="Run").click()
    page.wait_for_selector(".result .picture figure", timeout=120_000)
    page.locator(".top nav a", has_text="Runs").click()
    assert page.locator(".runs td.state").first.inner_text() == "done"
    page.locator(".runs button", has_text="Open").first.click()
    page.wait_for_selector(".result figure")
    assert not visit.complaints


def test_markup_in_a_prompt_stays_text(visit):
    nasty = "<img src=x onerror=alert(1)>"
    page = visit.show("why", prompt=nasty)
    assert nasty.replace(" ", "") in "".join(page.locator(".strip .token").all_inner_texts()).replace(" ", "")
    assert page.locator("main img").count() == 0
    assert not visit.complaints


def test_a_refusal_says_what_instead(visit):
    page = visit.show("why", prompt=PROMPT, target="not one token at all", foil=" Max")
    assert page.locator(".refusal .instead").count() >= 1
    visit.complaints.clear()  # the browser names an answer of 422 in its console
