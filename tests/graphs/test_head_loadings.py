"""Head loadings: what hooks by hand measure in the frozen model, sums that are the edges, and what is refused."""

import pytest
import torch

import cutaway as ca
from cutaway.core.node import parse_edge
from cutaway.graphs import Neurons
from tests.graphs.made import FAMILIES, IDS, FrozenByHand, contribution, model, transcoders

PROMPTS = ca.tasks.as_prompts(IDS)
PAIR = ("logit.17-40",)


def loaded(name, kind="per layer", **options):
    units = Neurons() if kind == "neurons" else transcoders(name, kind)
    return ca.graphs.head_loadings(model(name), PROMPTS, units, **{"leading": 1, "samples": 1, "top": 60, **options})


def graph(name, kind, targets=PAIR):
    units = Neurons() if kind == "neurons" else transcoders(name, kind)
    return ca.graphs.trace(model(name), PROMPTS, units, targets=targets, leading=1, samples=1)


@pytest.mark.parametrize("kind", ["per layer", "cross-layer", "neurons"])
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_and_bypass_sum_to_the_edges_of_the_graph(name, kind):
    found, g = loaded(name, kind, targets=PAIR), graph(name, kind)
    wanted = torch.stack([g.weight[g.edge(e)] for e in found.labels["edge"]])
    total = found.loading.sum((1, 2)) + found.bypass
    assert float((total - wanted).abs().max()) < 1e-10 * float(wanted.abs().max())
    assert (found.loading.abs().sum((1, 2)) > 1e-6 * wanted.abs()).all()
    assert not found.bypass.any()  # another position is reached by attention alone


def test_in_single_precision_loadings_sum_to_edges_within_rounding():
    m = ca.load("miniworld")
    for units in (ca.dictionaries.load("miniworld/transcoders"), "neurons"):
        found = ca.graphs.head_loadings(m, "The capital of Norway is", units, nodes=300, samples=1)
        assert float(found.residual.abs().max()) < 1e-5 * float(found.weight.abs().max())


def by_z(m, acts, by_hand, added):
    """What each head adds to the stream at the last position when vectors are added with all else frozen."""
    seen, hooks = [{}, {}], []
    for i in range(m.shape.n_layers):
        o = m.anatomy.part(i, "o")
        hooks.append(o.register_forward_pre_hook(lambda mod, args, i=i: seen[-1].update({i: args[0][0]})))
    by_hand.reads({})
    before = dict(seen[-1])
    by_hand.reads(added)
    for h in hooks:
        h.remove()
    rows = []
    for i in range(m.shape.n_layers):
        w = m.weights.o[i].detach()
        moved = (seen[-1][i] - before[i])[-1].view(m.shape.n_heads, -1)
        out, behind = torch.einsum("he,hed->hd", moved, w), m.anatomy.part(i, "ln1_post")
        if behind is not None:
            whole = torch.einsum("qhe,hed->qd", acts[f"z.{i}"][0], w) + m.weights.o_bias[i].detach()
            norm = m.anatomy.norm(behind)
            out = norm.linear(out, norm.scale(whole)[-1].expand(len(out)))
        rows.append(m.anatomy.multiplier * out)
    return torch.stack(rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_loadings_are_what_hooks_measure_of_each_head_behind_which_no_head_is(name):
    m, d, g = model(name), transcoders(name, "plain"), graph(name, "plain")
    acts = m.capture(IDS, ["z", "resid_post", "pattern"])  # patterns too, for attention of the same precision
    by_hand = FrozenByHand(m, {}, 1)
    apart = torch.tensor([getattr(n, "position", None) in range(5) for n in g.nodes])
    read = (g.weight[-1].abs() * (g.kinds["unit"] | g.kinds["token"]) * apart).topk(12).indices[::4].tolist()
    final = m.anatomy.norm(m.anatomy.top("final"))
    scale = final.scale(acts[f"resid_post.{m.shape.n_layers - 1}"][0, -1])
    apart = (m.weights.unembed[:, 17] - m.weights.unembed[:, 40]).detach()
    names = [f"{g.labels['node'][s]}→{g.labels['target'][-1]}" for s in read]
    found = loaded(name, "plain", edges=tuple(names), targets=PAIR)
    for s, loading in zip(read, found.loading, strict=True):
        out = by_z(m, acts, by_hand, contribution(g, m, d, by_hand, s))
        wanted = final.linear(out, scale.expand(out.shape[:-1])) @ apart
        assert torch.allclose(loading, wanted, atol=1e-9 * float(wanted.abs().max().clamp_min(1e-3)), rtol=0)
    assert (found.loading.abs().amax((1, 2)) > 1e-6).all()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_parallel", "gemma2", "granite"])
def test_the_bypass_is_the_edge_with_what_attention_adds_held(name):
    m, d, g = model(name), transcoders(name, "per layer"), graph(name, "per layer")
    by_hand = FrozenByHand(m, d.skip, 1, "attn_out")
    found = loaded(name, edges=tuple(f"{s}→{t}" for s, t in _pairs(g)), targets=PAIR)
    for text, bypass in zip(found.labels["edge"], found.bypass.tolist(), strict=True):
        edge = parse_edge(text)
        moved = by_hand.moved(contribution(g, m, d, by_hand, g.labels["node"].index(str(edge.source))))
        t = edge.target
        wanted = float(moved[f"mlp_in.{t.block}"][t.position] @ d.encoder[t.block][f"mlp_in.{t.block}"][t.index])
        assert bypass == pytest.approx(wanted, abs=1e-9)
    assert int((found.bypass.abs() > 1e-6).sum()) > 3


def _pairs(g):
    """Edges into the units of the last layer, from tokens and from units of the first."""
    last = [n for n in g.labels["target"] if n.startswith("latent.2.")][-3:]
    return [(s, t) for t in last for s in (*[n for n in g.labels["node"] if n.startswith("latent.0.")][-6:], "embed@5")]


def test_one_layer_apart_a_loading_is_pattern_times_the_ov_circuit():
    """A head of the last layer, from an MLP right below it: pattern · w W_V W_O · v, no norms' weights to fold."""
    m, d, g = model("llama_gqa"), transcoders("llama_gqa", "plain"), graph("llama_gqa", "plain")
    last = m.shape.n_layers - 1
    source = next(n for n in g.labels["node"] if n.startswith(f"latent.{last - 1}.") and n.endswith("@3"))
    found = loaded("llama_gqa", "plain", edges=(f"{source}→{g.labels['target'][-1]}",), targets=PAIR)
    acts = m.capture(IDS, ["pattern", "resid_pre", "resid_post"])
    written = contribution(g, m, d, FrozenByHand(m, {}, 1), g.labels["node"].index(source))[f"mlp_out.{last - 1}@3"]
    ln1, final = m.anatomy.norm(m.anatomy.part(last, "ln1")), m.anatomy.norm(m.anatomy.top("final"))
    x = ln1.linear(written, ln1.scale(acts[f"resid_pre.{last}"][0, 3]))
    v = (m.weights.unembed[:, 17] - m.weights.unembed[:, 40]).detach() * final.weight
    v = v / final.scale(acts[f"resid_post.{last}"][0, -1])
    for h in range(m.shape.n_heads):
        ov = m.weights.ov(last, h)
        wanted = float(acts[f"pattern.{last}"][0, h, -1, 3] * (x @ (ov.left @ ov.right).detach() @ v))
        assert float(found.loading[0, last, h]) == pytest.approx(wanted, rel=1e-9)
    assert float(found.loading[0, :last].abs().max()) == 0.0
    assert float(found.bypass[0]) == 0.0


def test_random_vectors_are_loaded_apart_from_their_source():
    one, other = loaded("llama_gqa", samples=4, seed=1), loaded("llama_gqa", samples=4, seed=2)
    assert torch.equal(one.loading, other.loading)
    carried = one.loading.abs().amax((1, 2)) > 1e-6
    assert (one.loading_null[carried].std(-1).amax((1, 2)) > 0).all()
    assert not torch.equal(one.loading_null, other.loading_null)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"edges": ("latent.9.9@9→logit.17-40@5",)}, "no such entry"),
        ({"edges": ("embed@1→embed@2",)}, "no such entry"),
        ({"edges": ("bias→logit.17-40@5",)}, "no unit, error or token"), ({"top": 0}, "none with an influence"),
        ({"edges": ("others.1@3→logit.17-40@5",), "nodes": 5}, "no unit, error or token"),
    ],
)  # fmt: skip
def test_what_is_no_edge_is_refused(options, word):
    with pytest.raises(ca.Refused, match=word):
        loaded("llama_gqa", targets=PAIR, **options)
