"""Docs are true: generated pages equal what the generator prints, code fences run, numbers come from results."""

import json
import re

import pytest

from cutaway.core.address import parse
from cutaway.models.anatomy.foreign_names import from_transformer_lens
from tests.meta.tree import ROOT
from tools.docs import pages

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
RETURNS = re.compile(r"^(?P<margin> *)(?P<code>[^#\n]+?)  # → (?P<value>.+)$", re.MULTILINE)
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
    scope = {"__name__": "docs", "returns": returns}
    for margin, block in FENCE.findall(page.read_text("utf-8")):
        lines = re.sub(f"^{margin}", "", block, flags=re.MULTILINE)
        code = RETURNS.sub(lambda m: f"{m['margin']}returns({m['code']}, {m['value']!r})", lines)
        exec(compile(code, name(page), "exec"), scope)


def returns(value, said):
    """A line of a page that ends with `# → said` returns that."""
    assert repr(value) == said.strip()


def test_the_check_of_returned_values_sees():
    line = "len('ab')  # → 3"
    assert RETURNS.search(line)
    with pytest.raises(AssertionError):
        returns(len("ab"), "3")


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


def cutaway_lines(text):
    """The code of every `cutaway` column of a page's tables, in reading order."""
    column, lines = None, []
    for row in text.splitlines():
        cells = [c.strip() for c in row.strip("|").split(" | ")] if row.startswith("|") else []
        if not cells:
            column = None
        elif column is None:
            column = cells.index("cutaway") if cells[0] == "task" else -1
        elif column >= 0 and not cells[0].startswith("---"):
            lines += re.findall(r"`([^`]+)`", cells[column])
    return lines


def test_every_line_for_newcomers_from_other_tools_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "coming_from.md").read_text("utf-8")
    lines, scope = cutaway_lines(text), {}
    assert len(lines) == sum(r.startswith("| ") for r in text.splitlines()) - 13 - 6  # without names and headings
    exec(compile(FENCE.search(text)[2], "coming_from.md", "exec"), scope)
    for line in lines:
        exec(compile(line, line, "exec"), scope)


def test_names_of_places_for_newcomers_are_those_of_transformer_lens():
    text = (ROOT / "docs" / "coming_from.md").read_text("utf-8")
    rows = re.findall(r"^\| `([^`]*hook_[^`]*)`.*\| `([^`]+)`[^|]*\|$", text, re.MULTILINE)
    assert len(rows) == 13
    assert [from_transformer_lens(theirs) for theirs, _ in rows] == [parse(ours) for _, ours in rows]
