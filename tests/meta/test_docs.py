"""Docs are true: generated pages equal what the generator prints, code fences run, numbers come from results."""

import json
import re

import pytest

from tests.meta.tree import ROOT
from tools.docs import pages

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#]+)")
NUMBER = re.compile(r"<!-- bench:(?P<file>[\w.-]+):(?P<work>[^>]+?) -->\s*\**(?P<value>[-\d.]+)")


def name(path):
    return path.relative_to(ROOT).as_posix()


def test_generated_pages_are_up_to_date():
    stale = [p for p, text in pages().items() if not (ROOT / p).is_file() or (ROOT / p).read_text("utf-8") != text]
    assert not stale, f"run `make docs`: {stale}"


def test_no_method_card_is_left_of_a_method_that_is_gone():
    committed = {name(p) for p in (ROOT / "docs" / "methods").glob("*.md")}
    assert committed == {p for p in pages() if p.startswith("docs/methods/")}


@pytest.mark.parametrize("page", [p for p in PAGES if FENCE.search(p.read_text("utf-8"))], ids=name)
def test_code_fences_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "docs"}
    for block in FENCE.findall(page.read_text("utf-8")):
        exec(compile(block, name(page), "exec"), scope)


def test_links_between_pages_lead_somewhere():
    wrong = [f"{name(p)}: {link}" for p in PAGES for link in LINK.findall(p.read_text("utf-8"))
             if not (p.parent / link).exists()]  # fmt: skip
    assert not wrong, wrong


def test_marked_numbers_equal_the_committed_results():
    wrong = []
    for page in PAGES:
        for found in NUMBER.finditer(page.read_text("utf-8")):
            rows = json.loads((ROOT / "bench" / "results" / f"{found['file']}.json").read_text("utf-8"))["rows"]
            values = [r["value"] for r in rows if r["work"] == found["work"].strip()]
            digits = len(found["value"].partition(".")[2])
            if not values or round(float(values[0]), digits) != float(found["value"]):
                wrong.append(f"{name(page)}: {found[0]!r} against {values}")
    assert not wrong, wrong


def test_bench_results_keep_their_form():
    for path in (ROOT / "bench" / "results").glob("*.json"):
        data = json.loads(path.read_text("utf-8"))
        assert data["machine"], path
        for row in data["rows"]:
            assert {"work", "value", "unit", "bar", "sense", "peer", "ratio"} <= set(row), path
            assert row["sense"] in ("max", "min")
