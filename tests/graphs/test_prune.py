"""Pruning: what circuit-tracer 0.5's own steps keep, the smallest sets, and nodes that must stay."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cutaway as ca
from cutaway.graphs import PRESETS, Neurons, prune
from cutaway.graphs.prune import covering
from cutaway.views.graph_layout import MOST_EDGES, layout
from tests.graphs.made import IDS, model, transcoders


@pytest.fixture(scope="module")
def whole():
    return ca.graphs.trace(
        model("llama_gqa"), ca.tasks.as_prompts(IDS), transcoders("llama_gqa", "cross-layer"), leading=1, samples=3
    )


def threshold(scores, share):
    """The smallest score of circuit-tracer's smallest set."""
    found = scores.flatten().sort(descending=True).values
    at = torch.searchsorted(found.cumsum(0) / found.sum(), share)
    return found[min(int(at), len(found) - 1)]


def by_the_book(g, nodes, edges, errors_stay):
    """The steps of circuit-tracer 0.5's `prune_graph`, on a square matrix of its kinds of nodes alone."""
    n = len(g.influence)
    counted = g.kinds["unit"] | g.kinds["error"] | g.kinds["token"]
    square = torch.zeros(n, n, dtype=g.weight.dtype)
    square[g.node_of] = g.weight * counted
    start = torch.zeros(n, dtype=g.weight.dtype)
    start[g.node_of] = g.share

    def influences(a):
        a = a.abs() / a.abs().sum(1, keepdim=True).clamp_min(1e-10)
        step, total = start @ a, torch.zeros_like(start)
        while step.any():
            total, step = total + step, step @ a
        return total, a

    found, _ = influences(square)
    kept = found >= threshold(found, nodes)
    always = g.kinds["token"] | g.kinds["target"] | (g.kinds["error"] if errors_stay else g.kinds["constant"])
    kept = (kept | always) & ~g.kinds["constant"]
    square = square * kept * kept[:, None]
    again, a = influences(square)
    scores = a * (again + start)[:, None]
    edge = scores >= threshold(scores, edges)
    while True:
        now = kept & (always | edge.any(0))
        now &= always | ~g.kinds["unit"] | edge.any(1)
        edge &= now & now[:, None]
        if torch.equal(now, kept):
            return kept, torch.where(edge, square, 0.0)
        kept = now


@pytest.mark.parametrize(("preset", "nodes", "edges"), [("circuit-tracer", 0.8, 0.98), ("circuit-tracer", 0.5, 0.6),
                                                         ("paper", 0.7, 0.9)])  # fmt: skip
def test_what_stays_is_what_the_steps_of_the_tool_keep(whole, preset, nodes, edges):
    kept, square = by_the_book(whole, nodes, edges, preset == "paper")
    found = prune(whole, preset, nodes=nodes, edges=edges)
    names = whole.labels["node"]
    assert found.labels["node"] == [names[i] for i in kept.nonzero()[:, 0].tolist()]
    edges_of = {f"{names[s]}→{names[t]}": float(square[t, s]) for t, s in square.nonzero().tolist()}
    assert dict(zip(found.edge_names(), found.weight.tolist(), strict=True)) == pytest.approx(edges_of)
    assert 10 < len(edges_of) < int((whole.weight != 0).sum())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_keeps_its_kinds_and_says_so(whole, preset):
    found, row = prune(whole, preset), PRESETS[preset]
    assert found.record["pruning"]["nodes"] == row.nodes
    kinds = {n for n in whole.labels["node"] if any(whole.kinds[k][whole.labels["node"].index(n)] for k in row.kept)}
    assert kinds <= set(found.labels["node"])
    assert set(found.labels["node"]) < set(whole.labels["node"])
    assert 0 < found.record["scores"]["replacement"] <= 1
    assert found.plot() is not None


def test_no_copy_of_all_edges_is_made(whole, monkeypatch):
    largest = 0

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != whole.weight.data_ptr():
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr("cutaway.graphs.influence.ROWS", 8)
    _ = whole.kinds, whole.level
    with Watched():
        prune(whole, nodes=0.5, edges=0.6)
    assert 0 < largest < 0.7 * whole.weight.numel()


def test_cumulative_shares_are_those_of_the_rank(whole):
    found = prune(whole)
    influence, cumulative = found.attribute("influence"), found.attribute("cumulative")
    total = float(whole.influence.sum())
    for i in (0, 5, 9):
        above = whole.influence[whole.influence >= influence[i]].sum()
        assert float(cumulative[i]) == pytest.approx(float(above) / total)


def test_pinned_nodes_stay(whole):
    least = min((i for i in whole.kinds["unit"].nonzero()[:, 0].tolist()), key=lambda i: float(whole.influence[i]))
    name = whole.labels["node"][least]
    assert name not in prune(whole).labels["node"]
    assert name in prune(whole, pinned=(name,)).labels["node"]


def test_the_smallest_set_is_smallest():
    values = torch.tensor([0.1, 0.5, 0.0, 0.3, 0.1])
    assert covering(values, 0.8).tolist() == [False, True, False, True, False]
    assert covering(values, 0.81).sum() == 3
    assert covering(values, 1.0).tolist() == [True, True, False, True, True]


def test_what_is_no_pruning_is_refused(whole):
    with pytest.raises(ca.Refused, match="no such preset"):
        prune(whole, "mine")
    with pytest.raises(ca.Refused, match=r"nodes=1\.5"):
        prune(whole, nodes=1.5)
    with pytest.raises(ca.Refused, match="no such entry"):
        prune(whole, pinned=("latent.9.9@9",))
    with pytest.raises(ca.Refused, match="constants have no influence"):
        prune(whole, pinned=("bias",))


def test_nodes_that_random_targets_reach_as_far_are_pale():
    g = ca.graphs.trace(model("llama_gqa"), ca.tasks.as_prompts(IDS), transcoders("llama_gqa"), leading=1, samples=9)
    assert torch.equal(g.excess, g.influence - g.influence_null.max(1).values)
    by_excess = g.top(3, by="excess", largest=True)
    assert [row["excess"] for row in by_excess] == g.excess.sort(descending=True).values[:3].tolist()
    found = prune(g, edges=0.5)  # few enough edges that all are drawn
    want = {n for n, e in zip(g.labels["node"], g.excess.tolist(), strict=True) if e > 0 or n.startswith("logit")}
    kept = {n for n, e in zip(found.labels["node"], found.exceeds.tolist(), strict=True) if e}
    assert kept == want & set(found.labels["node"])
    assert 0 < len(kept) < len(found.nodes)
    page, boxes = found._repr_html_(), layout(found).take(range(len(found.weight))).boxes
    assert len(found.weight) <= MOST_EDGES
    assert 0 < page.count(' weak"><title>') == sum(b.weak for b in boxes) < len(boxes)
    assert "pale nodes do not exceed their control" in page
    few = ca.graphs.trace(model("llama_gqa"), ca.tasks.as_prompts(IDS), transcoders("llama_gqa"), leading=1, samples=8)
    assert prune(few).exceeds is None, "chance alone would mark one node in nine"


def test_graphs_of_neurons_and_of_budgets_are_pruned_too():
    g = ca.graphs.trace(model("gemma2"), ca.tasks.as_prompts(IDS), Neurons(), nodes=80, samples=3)
    found = prune(g, nodes=0.95)
    assert any(n.startswith("mlp_post") for n in found.labels["node"])
    assert any(n.startswith("others") for n in found.labels["node"])
