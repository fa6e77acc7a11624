"""Graphs as pictures: a ranked list in a terminal, nodes by depth and position in figures and pages."""

import io
import re

import pytest
import torch
from rich.console import Console

from cutaway.core.graph import graph
from cutaway.views import html
from cutaway.views.draw import figure
from cutaway.views.draw.terminal import table, terminal
from cutaway.views.spec import fields, pictures

EDGES = [
    "embed@0→latent.0.7@0", "latent.0.7@0→z.1.2@2", "z.1.2@2→latent.1.3@2", "error.1@2→logit.9@2",
    "latent.1.3@2→logit.9@2", "embed@2→logit.9@2",
]  # fmt: skip
WEIGHT = torch.tensor([0.5, -2.0, 1.5, 0.1, 3.0, -0.2])


@pytest.fixture(scope="module")
def result():
    null = 0.05 * torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    bounds = torch.stack([WEIGHT - 0.3, WEIGHT + 0.3], -1)
    return graph(EDGES, WEIGHT, interval=bounds, null=null, words=["<a>", " b", " c"], unit="logits",
                 attributes={"activation": torch.arange(7.0)})  # fmt: skip


def test_edges_are_ranked_and_keep_their_ends(result):
    (p,) = pictures(result)
    assert (p.kind, p.rows[:2], p.values[0]) == ("graph", (EDGES[4], EDGES[1]), (3.0,))
    for row, (s, t) in zip(p.rows, p.layout.ends, strict=True):
        source, target = (re.sub("@.*", "", n) for n in row.split("→"))
        assert (p.layout.boxes[s].name, p.layout.boxes[t].name) == (source, target)
        assert p.layout.boxes[s].depth < p.layout.boxes[t].depth
    assert p.stands_out(0, 0) is True
    assert p.stands_out(p.rows.index(EDGES[3]), 0) is False
    assert fields(result) == ["weight", "attributes"]


def test_few_edges_keep_the_nodes_that_they_touch_only(result):
    (p,) = pictures(result, edges=2)
    assert [b.name for b in p.layout.boxes] == ["latent.0.7", "z.1.2", "latent.1.3", "logit.9"]
    assert (p.layout.depths, p.layout.columns) == (("0 MLP", "1 attention", "1 MLP", "logits"), ("<a>", "c"))
    assert p.note == "2 largest of 6"


def test_boxes_of_a_cell_stand_side_by_side(result):
    (p,) = pictures(result)
    places = [(b.depth, b.slot) for b in p.layout.boxes]
    assert len(set(places)) == len(places)
    for b in p.layout.boxes:
        assert p.layout.starts[b.column] <= b.slot <= p.layout.starts[b.column + 1] - 1


def test_every_medium_draws_it(result):
    out = io.StringIO()
    Console(file=out, width=80, no_color=True).print(terminal(result), table(result, n=2))
    assert out.getvalue().index(EDGES[4]) < out.getvalue().index(EDGES[1])
    text = html.html(result, "weight")
    assert len(re.findall("<path class=", text)) == 6
    assert len(re.findall('<g class="cw-node', text)) == 7
    assert "<a>" not in text
    assert "&lt;a&gt;" in text
    frame = figure.figure(result).axes[0]
    assert len(frame.patches) == 6
    assert {t.get_text() for t in frame.texts} == {"embed", "latent.0.7", "z.1.2", "latent.1.3", "error.1", "logit.9"}


def test_a_graph_without_edges_is_drawn(result):
    lone = result.select(node=["embed@0"])
    assert "no edges" in html.html(lone, "weight") or "no entries" in html.html(lone, "weight")
    figure.figure(lone)
    Console(file=io.StringIO(), width=80).print(terminal(lone))
