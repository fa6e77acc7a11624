"""HTML: balanced, escaped, self-contained, deterministic; intervals and controls are inside."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

from cutaway.views.html import drawn, html
from cutaway.views.page import POLICY, Badge, Opening, Section, Show, report
from cutaway.views.spec import fields
from tests.views import samples

VOID = {"meta", "br", "input", "link", "img", "hr"}
SVG = {"rect", "line", "circle", "polygon", "polyline"}
HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&"


class Balance(HTMLParser):
    """Complains about a tag that closes nothing, and keeps tags, attributes and texts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SVG, f"<{tag}/> is no empty element of HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parsed(text: str) -> Balance:
    parser = Balance()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def whole() -> str:
    sections = [
        Section(
            "Heading",
            "A question?",
            ["Prose."],
            [Show(r, f, "Caption.") for f in fields(r)],
            [Badge("agrees", "agrees")],
        )
        for r in samples.every()
    ]
    opening = Opening(
        samples.PROMPT, " Mary", " John", ["Summary."], [Badge("b", "disagrees", "d")], {"model": "miniworld"}
    )
    return report("Why “Mary”?", sections, opening=opening)


@pytest.mark.parametrize("result", samples.every(), ids=lambda r: r.kind)
def test_every_field_is_drawn_balanced(result):
    assert parsed(html(result)).tags
    for field in fields(result):
        assert parsed(drawn(result, field)).tags[0][0] in ("figure", "div")


def test_page_is_balanced_and_asks_for_nothing():
    page = whole()
    tags = parsed(page).tags
    assert [a["content"] for t, a in tags if t == "meta" and "http-equiv" in a] == [POLICY]
    assert not {t for t, _ in tags} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [a for _, a in tags if {"src", "srcset", "action", "data", "poster"} & set(a)]
    assert {a["href"][0] for _, a in tags if "href" in a} == {"#"}
    assert not [n for _, a in tags for n in a if n.startswith("on")]
    assert "http:" not in page
    assert "https:" not in page
    assert "//" not in page
    assert not re.search(r"url\(|@import|@font-face", page)
    assert len([t for t, _ in tags if t == "script"]) == 1


def test_same_input_same_bytes():
    assert whole() == whole()
    assert html(samples.lens()) == html(samples.lens())


def test_page_is_written(tmp_path):
    text = report("T", [Section("S", shows=[samples.heads()])], tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == text


def test_ids_are_unique_and_every_link_has_its_target():
    tags = parsed(whole()).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for _, a in tags if "href" in a} <= set(ids)


def test_hostile_texts_are_only_text():
    words = [HOSTILE, " b"]
    results = [
        samples.Places(effect=torch.ones(1, 2), labels={"position": words, "effect": [[HOSTILE, "w"]]},
                       units={"effect": HOSTILE}, record={"method": HOSTILE, "control": HOSTILE, "python": HOSTILE,
                                                          HOSTILE: {HOSTILE: [HOSTILE]}}),
        samples.Shapes(strip=torch.ones(2), labels={"position": words}),
        samples.Parts(contribution=torch.ones(2), null=torch.ones(2, 3), labels={"component": words},
                      record={"control": HOSTILE}),
        samples.Lens(probability=torch.ones(1, 2), token=torch.ones(1, 2, 1).int(), target=torch.ones(1),
                     answer=torch.ones(1, 2), labels={"candidate": words, "layer": [HOSTILE]}),
    ]  # fmt: skip
    sections = [Section(HOSTILE, HOSTILE, [HOSTILE], [Show(r, f, HOSTILE) for r in results for f in fields(r)],
                        [Badge(HOSTILE, "unknown", HOSTILE)])]  # fmt: skip
    page = report(HOSTILE, sections, opening=Opening(HOSTILE, HOSTILE, HOSTILE, [HOSTILE], (), {HOSTILE: HOSTILE}))
    seen = parsed(page)
    assert "<script>alert" not in page
    assert [t for t, _ in seen.tags].count("script") == 1
    assert not [a for t, a in seen.tags if t == "img" or any(n.startswith("on") for n in a)]
    assert any("alert(1)" in text for text in seen.texts)


def test_interval_and_control_are_one_hover_away():
    p = html(samples.heads())
    tips = [a["title"] for t, a in parsed(p).tags if t == "td" and "title" in a]
    assert len(tips) == 48
    assert all("interval [" in t and "control [" in t for t in tips)
    assert tips[4 * 8 + 1].startswith("layer 4 · head 1\neffect 1.9 logits")
    assert "interval without 0 and outside the pooled band of 60 random heads a cell; chance alone marks at most" in p
    bars = drawn(samples.parts())
    assert bars.count("class=cw-null ") == 24
    assert bars.count("class=cw-err ") == 3 * 24
    assert "unless interval without 0 and outside the range of 100 random heads; chance alone" in bars
    assert "cw-band" in drawn(samples.lens(), "target")


def test_record_is_told():
    text = "".join(parsed(html(samples.heads())).texts)
    for word in ("0f3a9c21d4e5b677", "Wang et al. 2023", "26.5 forwards", "at most heads * F", "2.13.0",
                 "cutaway patching activation --model miniworld --task ioi", "direction='denoise'"):  # fmt: skip
        assert word in text


def test_missing_values_are_hatched_not_zero():
    x = torch.tensor([[math.nan, 1.0]])
    cells = [a["class"] for t, a in parsed(drawn(samples.Heads(effect=x))).tags if t == "td"]
    assert cells == ["nan", "p10"]
    holes = torch.tensor([1.0, math.nan, 2.0, 3.0])
    assert drawn(samples.Shapes(curve=holes)).count("<polyline") == 2
    nothing = samples.Heads(effect=torch.full((1, 2), math.nan), interval=torch.full((1, 2, 2), math.nan))
    assert "no value" in html(nothing)
    assert parsed(html(samples.Parts(contribution=torch.tensor([math.nan, 0.0])))).tags


def test_empty_axes_are_drawn():
    assert parsed(html(samples.Shapes(edges=torch.zeros(0)))).tags
    assert parsed(html(samples.Heads(effect=torch.zeros(0, 3)))).tags
    assert parsed(html(samples.Shapes(curve=torch.zeros(0)))).tags


def test_large_fields_stay_small():
    assert (
        len(html(samples.Shapes(neurons=torch.randn(12, 4096, generator=torch.Generator().manual_seed(0))))) < 600_000
    )


def test_importing_and_drawing_html_leaves_matplotlib_alone():
    code = (
        "import sys, torch; from tests.views import samples; import cutaway;"
        "from cutaway.views.page import report, Section; from cutaway.views.draw.terminal import terminal;"
        "from rich.console import Console;"
        "report('t', [Section('s', shows=samples.every())]); samples.heads()._repr_html_();"
        "Console(file=open(__import__('os').devnull, 'w')).print(terminal(samples.heads()));"
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
