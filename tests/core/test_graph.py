"""A graph names its edges, keeps its parts together, saves and opens, and lays its nodes out by layer and position."""

import pytest
import torch

from cutaway.core.graph import Graph, graph
from cutaway.core.node import Edge, Latent, parse_node
from cutaway.core.refuse import Refused
from cutaway.core.result import open_result

EDGES = [
    "embed@0→latent.0.7@0", "latent.0.7@0→z.1.2@2", "z.1.2@2→latent.1.3@2", "error.1@2→logit.9@2",
    "latent.1.3@2→logit.9@2", "embed@2→logit.9@2",
]  # fmt: skip
WEIGHT = torch.tensor([0.5, -2.0, 1.5, 0.1, 3.0, -0.2])
WORDS = ["When", " Mary", " and"]


def small(**more) -> Graph:
    bounds = torch.stack([WEIGHT - 0.3, WEIGHT + 0.3], -1)
    null = 0.1 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return graph(EDGES, WEIGHT, interval=bounds, null=null, words=WORDS, unit="logits", **more)


def test_nodes_and_edges_are_what_was_given():
    g = small()
    assert g.edge_names() == EDGES == [str(e) for e in g.edges]
    assert g.nodes[1] == Latent(0, 7, 0)
    assert g.edges[3] == Edge(parse_node("error.1@2"), parse_node("logit.9@2"))


def test_top_and_frame_name_their_nodes():
    g = small()
    first = g.top(2)
    assert [row["edge"] for row in first] == [EDGES[4], EDGES[1]]
    assert (first[1]["source"], first[1]["target"], first[1]["weight"]) == ("latent.0.7@0", "z.1.2@2", -2.0)
    table = g.frame()
    assert list(table.columns) == ["edge", "source", "target", "weight"]
    assert table["edge"].tolist() == EDGES
    assert len(g.frame("interval")) == 12
    assert list(g.frame("interval").columns) == ["edge", "source", "target", "bound", "interval"]


def test_selecting_edges_and_nodes():
    g = small(attributes={"activation": torch.arange(7.0)})
    one = g.select(edge="z.1.2@2->latent.1.3@2")
    assert (one.edge_names(), one.weight.tolist()) == ([EDGES[2]], [1.5])
    sub = g.select(node=["logit.9@2", "latent.1.3@2", "z.1.2@2"])
    assert sub.edge_names() == [EDGES[2], EDGES[4]]
    assert sub.labels["node"] == ["logit.9@2", "latent.1.3@2", "z.1.2@2"]
    torch.testing.assert_close(sub.interval, g.interval[[2, 4]])
    torch.testing.assert_close(sub.attribute("activation"), g.attribute("activation")[[g.labels["node"].index(n)
                               for n in sub.labels["node"]]])  # fmt: skip
    lone = g.select(node="embed@0")
    assert (lone.edge_names(), lone.labels["node"]) == ([], ["embed@0"])
    with pytest.raises(Refused, match="does not have it"):
        g.select(edge="embed@0→logit.9@2")
    with pytest.raises(Refused, match="no such entry"):
        g.select(node="embed@1")
    with pytest.raises(Refused, match="influence"):
        g.attribute("influence")


def test_layout_is_layer_by_position():
    g = small()
    rows = dict(zip(g.labels["node"], zip(g.depth.tolist(), g.labels["depth"], strict=True), strict=True))
    assert rows["embed@0"] == (0, "embedding")
    assert [rows[n][1] for n in ("latent.0.7@0", "z.1.2@2", "error.1@2", "logit.9@2")] == [
        "0 MLP", "1 attention", "1 MLP", "logits",
    ]  # fmt: skip
    assert all(g.depth[s] < g.depth[t] for s, t in zip(g.source, g.target, strict=True))
    columns = dict(zip(g.column.tolist(), g.labels["column"], strict=True))
    assert columns == {0: "When", 1: " and"}


def test_readers_stand_below_writers_of_their_layer():
    g = graph(["embed→q_in.0.1", "q_in.0.1→z.0.1", "z.0.1→mlp_in.0", "mlp_in.0→mlp_out.0", "mlp_out.0→k_in.1.0"],
              torch.ones(5))  # fmt: skip
    assert all(g.depth[s] < g.depth[t] for s, t in zip(g.source, g.target, strict=True))
    assert set(g.labels["column"]) == {"any position"}


def test_saves_and_opens(tmp_path):
    g = small(attributes={"activation": torch.arange(7.0)})
    back = open_result(g.save(tmp_path / "g.safetensors"))
    assert isinstance(back, Graph)
    assert (back.edge_names(), back.labels, back.units) == (g.edge_names(), g.labels, g.units)
    for name, t in g.tensors().items():
        assert torch.equal(t, back.tensors()[name])


def test_a_graph_without_its_nodes_is_none():
    one = torch.zeros(1, dtype=torch.long)
    whole = {"weight": torch.ones(1), "source": one, "target": one + 1, "depth": one, "column": one}
    with pytest.raises(ValueError, match="a label for each node"):
        Graph(**whole)
    with pytest.raises(ValueError, match="ends at a node"):
        Graph(**whole, labels={"node": ["embed"]})
