"""Sparse feature circuits: effects that add up to their site's, edges that add up to effects, both measured by hand."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.core.node import Error, Latent, parse_node
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator, rotation
from cutaway.dictionaries.gates import BatchTopK, Gated, JumpRelu, Relu, TopK
from cutaway.dictionaries.transforms import autoencoder, one_block
from cutaway.graphs import feature_circuit
from cutaway.graphs.node_effects import points
from cutaway.models.edits.library import Add, Freeze
from cutaway.models.model import Model
from tests.conformance import subjects
from tests.models.tiny import V, build

SITES = ("resid_pre.0", "attn_out.0", "mlp_out.0", "resid_post.0", "attn_out.1", "mlp_out.1", "resid_post.1")
WHOLE = {"nodes": 0.0, "edges": 0.0, "audit": 0, "samples": 2}


@cache
def model(name):
    """A random model in float64 whose weights are large enough for effects of about 1."""
    hf = build(name).double()
    with torch.no_grad():
        for p in hf.parameters():
            p.mul_(4.0 if p.ndim > 1 else 1.0)
    return Model(hf, subjects.word_tokenizer(V), f"large-{name}")


@cache
def saes(name, gate="relu", sites=SITES):
    """Autoencoders of several sites in float64, with biases, and one whose b_dec is subtracted."""
    g, width = torch.Generator().manual_seed(1), model(name).shape.d_model

    def one(n, site):
        rows, written = (torch.randn(6, width, generator=g, dtype=torch.float64) / width**0.5 for _ in range(2))
        bias = [torch.randn(k, generator=g, dtype=torch.float64) / 5 for k in (6, width)]
        made = {
            "relu": Relu,
            "topk": lambda: TopK(2),
            "jump": lambda: JumpRelu(0.1 * bias[0].abs()),
            "gated": lambda: Gated(bias[0], bias[0].flip(0), bias[0]),
        }[gate]()
        return autoencoder(site, rows, written, bias[0], bias[1], made, subtract_b_dec=n == 1)

    return [one(n, site) for n, site in enumerate(sites)]


def transcoder(name):
    """A transcoder of the second MLP."""
    g, width = torch.Generator().manual_seed(2), model(name).shape.d_model
    rows = [torch.randn(6, width, generator=g, dtype=torch.float64) / width**0.5 for _ in range(2)]
    zeros = torch.zeros(6, dtype=torch.float64), {"mlp_out.1": torch.zeros(width, dtype=torch.float64)}
    return one_block({"mlp_in.1": rows[0]}, {"mlp_out.1": rows[1]}, *zeros, Relu())


def task(**options):
    return subjects.numbered_task(**options)


def found(name, ds=None, asked=None, **options):
    return feature_circuit(model(name), asked or task(), ds or saes(name), **{**WHOLE, **options})


def by_site(c, values=None):
    """The sum over the nodes of each block."""
    out = {}
    for node, value in zip(c.nodes[:-1], c.effect if values is None else values, strict=False):
        site = c.blocks[node.block]
        out[site] = out.get(site, 0.0) + float(value)
    return out


FAMILIES = ("gpt2", "gpt_neox_parallel", "llama_gqa", "gemma2", "olmo2")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("steps", [0, 3])
def test_effects_of_nodes_add_up_to_that_of_their_site(name, steps):
    m, bound = model(name), task().bind(model(name))
    got = by_site(found(name, steps=steps))
    for site in SITES:
        acts = [m.capture(t, site)[site] for t in (bound.clean, bound.corrupt)]
        step, total = acts[1] - acts[0], 0.0
        for at in points(steps, "midpoint").tolist() if steps else [0.0]:
            slope = m.gradients(bound.clean, site, bound.measure, Add(site, step, at))[1][site]
            total += (slope * step).sum((1, 2)).mean() / max(steps, 1)
        assert got[site] == pytest.approx(float(total), abs=1e-6)


@pytest.mark.parametrize("gate", ["relu", "topk", "jump"])
def test_at_every_position_too(gate):
    ds = saes("gpt2", gate)[2:5]
    c, whole = (found("gpt2", ds, by=by, edges=1e4) for by in ("position", "all"))
    m, bound = model("gpt2"), task().bind(model("gpt2"))
    assert len(c.effect) == 6 * (len(whole.effect) - 1) + 1
    for site in SITES[2:5]:
        acts = [m.capture(t, site)[site] for t in (bound.clean, bound.corrupt)]
        slope = m.gradients(bound.clean, site, bound.measure)[1][site]
        want = ((acts[1] - acts[0]) * slope).sum(2).mean(0)
        for p in range(6):
            at = [v for n, v in zip(c.nodes, c.effect, strict=True) if n.position == p and c.blocks[n.block] == site]
            assert float(sum(at)) == pytest.approx(float(want[p]), abs=1e-6)
    assert {"latent.1.5@2", "error.2@2"} <= set(c.labels["node"])
    summed = dict.fromkeys(whole.labels["node"], 0.0)
    for n, v in zip(c.nodes[:-1], c.effect.tolist(), strict=False):
        summed[str(replace(n, position=None))] += v
    assert list(summed.values())[:-1] == pytest.approx(whole.effect[:-1].tolist(), abs=1e-6)


@pytest.mark.parametrize(("name", "by"), [*((name, "all") for name in FAMILIES), ("gpt2", "position")])
def test_edges_out_of_a_node_add_up_to_its_effect(name, by):
    ds = [*saes(name, "relu", ("resid_pre.0", "attn_out.0", "resid_post.0", "attn_out.1")), transcoder(name)]
    c = found(name, ds, by=by)
    assert c.blocks[-1] == "mlp_out.1"
    assert torch.allclose(c.carried[:-1], c.effect[:-1], atol=1e-6)
    inner = (c.target < len(c.effect) - 1) & (c.weight != 0)
    assert int(inner.sum()) > 20, "not only edges to the metric"


def test_the_edges_of_the_last_site_are_its_effects_with_integrated_gradients_too():
    c = found("gpt2", steps=4)
    last = [i for i, n in enumerate(c.nodes[:-1]) if n.block == len(SITES) - 1]
    edges = dict(zip(c.edge_names(), c.weight.tolist(), strict=True))
    for i in last:
        assert edges[f"{c.nodes[i]}→direction.metric"] == pytest.approx(float(c.effect[i]), abs=1e-7)
    assert not any(name.startswith("latent.5.") and "→latent.4" in name for name in edges), "no edge goes back"


def written(d, node, x):
    """What a node adds to its site."""
    code = d.encode(x.flatten(0, 1))
    if isinstance(node, Latent):
        return code.dense().reshape(*x.shape[:2], -1)[..., node.index, None] * d.decoder[0][d.writes[0]][node.index]
    return x - d.decode(code).reshape(x.shape)


@pytest.mark.parametrize(("name", "gate"), [("gpt2", "relu"), ("gpt_neox_parallel", "topk"), ("gpt2", "gated")])
def test_edges_by_hand(name, gate):
    """Finite differences: what a part of u's step changes in d with all sites between held, and that in the metric."""
    m, ds, bound, c = model(name), saes(name, gate), task().bind(model(name)), found(name, saes(name, gate))
    edges, eps = dict(zip(c.edge_names(), c.weight.tolist(), strict=True)), 1e-5
    acts = [m.capture(t, list(SITES)) for t in (bound.clean, bound.corrupt)]
    pairs = [(Latent(1, 2), Latent(3, 1)), (Latent(1, 0), Error(2)), (Error(2), Latent(3, 4)), (Latent(0, 3), Error(3)),
             (Latent(3, 1), Latent(5, 2)), (Error(3), Error(6)), (Latent(4, 5), Error(6))]  # fmt: skip
    for u, d in pairs:
        site = SITES[u.block]
        step = written(ds[u.block], u, acts[1][site]) - written(ds[u.block], u, acts[0][site])
        between = [Freeze(s, acts[0]) for s in SITES[u.block + 1 : d.block]]
        there = SITES[d.block]
        runs = [m.capture(bound.clean, [there], edits=[Add(site, step, k * eps), *between])[there] for k in (1, -1)]
        moved = (written(ds[d.block], d, runs[0]) - written(ds[d.block], d, runs[1])) / (2 * eps)
        runs = [m.run_last(bound.clean, Add(there, moved, k * eps)) for k in (1, -1)]
        ends = [logits.gather(1, bound.answers[:, None]) - logits.gather(1, bound.foils[:, None]) for logits in runs]
        want = (ends[0] - ends[1]).mean() / (2 * eps)
        assert edges[f"{u}→{d}"] == pytest.approx(float(want), abs=1e-6), f"{u}→{d}"
    assert sum(abs(edges[f"{u}→{d}"]) > 1e-4 for u, d in pairs) >= 4


def test_the_audit_is_an_exchange_by_hand():
    m, bound = model("llama_gqa"), task().bind(model("llama_gqa"))
    c = found("llama_gqa", audit=9, nodes=0.001, samples=3)
    assert c.record["agreement"].startswith("of ")
    own, other = (m.capture(t, list(SITES)) for t in (bound.clean, bound.corrupt))
    for name, exact in zip(c.labels["audited"], c.exact.tolist(), strict=True):
        node = parse_node(name)
        site = SITES[node.block]
        step = written(saes("llama_gqa")[node.block], node, other[site]) - written(
            saes("llama_gqa")[node.block], node, own[site]
        )
        want = bound.metric(m.run_last(bound.clean, Add(site, step))) - bound.metric(m.run_last(bound.clean))
        assert exact == pytest.approx(float(want.mean()), abs=1e-5)


def planted():
    """A linear dictionary of six directions of the last stream, and the task whose metric reads the third of them."""
    m = model("llama_gqa")
    basis = rotation(m.shape.d_model, generator(7), dtype=torch.float64)
    signed = JumpRelu(torch.full((6,), -torch.inf, dtype=torch.float64), signed=True)
    zeros = torch.zeros(6, dtype=torch.float64), torch.zeros(m.shape.d_model, dtype=torch.float64)
    d = autoencoder("resid_post.1", basis[:6], basis[:6], *zeros, signed)
    return d, ca.Task("read", task().pairs, metric=ca.tasks.activation("resid_post.1@-1", basis[2]))


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"steps": 3, "rule": "sfc"}])
def test_behind_which_all_is_linear_estimates_are_effects(options):
    """In the last stream only the latent that writes the metric's direction has an effect, and the error none."""
    d, asked = planted()
    c = feature_circuit(model("llama_gqa"), asked, [d], **{**WHOLE, "audit": 7, **options})
    assert torch.allclose(c.exact, c.estimate, atol=1e-6)
    assert c.effect[2] == pytest.approx(float(c.effect[-1]), abs=1e-6)
    assert float(c.effect[[0, 1, 3, 4, 5, 6]].abs().max()) < 1e-9


def test_steps_lie_at_midpoints_or_as_in_the_papers_code_at_left_ends():
    assert points(4, "midpoint").tolist() == [0.125, 0.375, 0.625, 0.875]
    assert points(10, "sfc").tolist() == pytest.approx([i / 10 for i in range(10)])
    one = found("gpt2", steps=1, rule="sfc")
    assert torch.allclose(one.effect, found("gpt2").effect, atol=1e-7)


def test_thresholds_keep_what_is_large_and_chance_is_counted():
    whole, part = found("gpt2"), found("gpt2", nodes=0.02, edges=0.01)
    large = [n for n, v in zip(whole.nodes[:-1], whole.effect, strict=False) if abs(v) >= 0.02]
    assert part.nodes[:-1] == large
    assert 3 < len(large) < len(whole.nodes) - 1
    known = dict(zip(whole.edge_names(), whole.weight.tolist(), strict=True))
    kept = {str(n) for n in part.nodes}
    want = {n for n, v in known.items() if abs(v) >= 0.01 and set(n.split("→")) <= kept}
    assert set(part.edge_names()) == want
    assert part.chance.tolist() == (whole.effect_null[:-1].abs() >= 0.02).sum(0).tolist()


def test_a_graph_shows_its_sites_as_rows():
    c = found("gpt2", saes("gpt2")[:3], nodes=0.001)
    assert set(c.labels["depth"]) == {"0 attention in", "0 attention", "0 MLP", "logits"}
    assert c.select(node=[str(n) for n in c.nodes[:3]]).effect.tolist() == c.effect[:3].tolist()
    assert ca.graphs.feature_circuit(model("gpt2"), task(), saes("gpt2")[0], **WHOLE).blocks == ("resid_pre.0",)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: [*d, d[0]], "written by two"),
        (lambda d: [autoencoder("resid_post.0", *weights(), BatchTopK(2))], "chooses among all tokens"),
        (lambda d: [autoencoder("resid_post.7", *weights(), Relu())], "layer"),
        (lambda d: [one_block({"mlp_in.0": weights()[0]}, {"mlp_out.0": weights()[1]}, weights()[2],
                              {"mlp_out.0": weights()[3]}, Relu(),
                              skip={("mlp_in.0", "mlp_out.0"): torch.eye(len(weights()[3]))})], "a skip is no node"),
        (lambda d: [one_block({"mlp_out.0": weights()[0]}, {"mlp_in.0": weights()[1]}, weights()[2],
                              {"mlp_in.0": weights()[3]}, Relu())], "written before"),
    ],
)  # fmt: skip
def test_dictionaries_whose_latents_are_no_nodes_are_refused(change, why):
    with pytest.raises(Refused, match=why):
        found("gpt2", change(saes("gpt2")))


def weights():
    width = model("gpt2").shape.d_model
    rows = torch.eye(width, dtype=torch.float64)
    return rows, rows, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)


def test_a_threshold_that_leaves_nothing_is_refused_with_the_largest_effect():
    with pytest.raises(Refused, match="the largest effect"):
        found("gpt2", nodes=1e4)
