"""The acceptance of graphs: with all else frozen, doubling a latent moves each downstream node by its edge's weight."""

import pytest
import torch

import cutaway as ca
from cutaway.core.address import Address
from cutaway.core.graph import graph
from cutaway.core.node import Edge, Latent, Logit
from cutaway.models.edits.library import Add, Freeze
from tests.dictionaries.common import dictionary
from tests.models.tiny import build

IDS = torch.tensor([[5, 9, 2, 11, 7, 3]])
LAYERS, LATENTS, TOKENS, LAST = 3, 12, (3, 17, 40), 5
FROZEN = ["pattern", "ln1.scale", "ln2.scale", "mlp_out", "final.scale"]


class RootMeanSquare(torch.nn.Module):
    """The same norm in the dtype of its input: transformers' own computes in float32, whatever the model's dtype is."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def in_float64(name):
    hf = build(name).double()
    for parent in list(hf.modules()):
        for key, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, key, RootMeanSquare(child))
    return hf


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox_parallel", "gpt_neox_sequential", "llama_gqa", "qwen3"])
def run(request):
    """A tiny model in float64, transcoders of its MLPs, and what everything is in the plain run."""
    model = ca.load(in_float64(request.param))
    sites = {f"mlp_{s}.{i}": model.shape.d_model for i in range(LAYERS) for s in ("in", "out")}
    d = dictionary([(LATENTS, [f"mlp_in.{i}"], [f"mlp_out.{i}"]) for i in range(LAYERS)], sites)
    acts = model.capture(IDS, [*FROZEN, "mlp_in", "q_in", "k_in", "v_in"], logits=False)
    return model, d, acts


def reads(model, d, edits):
    """All nodes that may move, by name, and what each branch of attention reads."""
    names = [f"{s}.{i}" for i in range(LAYERS) for s in ("mlp_in", "q_in", "v_in")]
    acts = model.capture(IDS, [*names, "logits"], edits)
    found = {}
    for i in range(LAYERS):
        pre = d.pre_activations(i, {f"mlp_in.{i}": acts[f"mlp_in.{i}"][0]})
        found |= {Latent(i, t, p): float(pre[p, t]) for t in range(LATENTS) for p in range(LAST + 1)}
    logits = acts["logits"][0, LAST].double()
    return found | {Logit(t, LAST): float(logits[t]) for t in TOKENS}, acts


def linear(model, acts, start, layer):
    """What the frozen model makes of a step `start` [position, d_model] behind `layer`, by its weights alone.

    Returns what each later layer's MLP and attention read of it, and what the final norm reads.
    """
    anatomy, w, step, mlp_reads, attention_reads = model.anatomy, model.weights, start, {}, {}
    for i in range(layer + 1, LAYERS):
        ln1, ln2 = (anatomy.norm(anatomy.part(i, n)) for n in ("ln1", "ln2"))
        x = ln1.linear(step, acts[f"ln1.scale.{i}"][0])
        shared = model.shape.n_heads // len(w.v[i])  # heads that share a key-value head
        values = torch.einsum("pd,hde->hpe", x, w.v[i].repeat_interleave(shared, 0))
        z = torch.einsum("hqk,hke->hqe", acts[f"pattern.{i}"][0].double(), values)
        after = step + torch.einsum("hqe,hed->qd", z, w.o[i])
        attention_reads[i] = x
        mlp_reads[i] = ln2.linear(step if anatomy.parallel else after, acts[f"ln2.scale.{i}"][0])
        step = after
    return mlp_reads, attention_reads, anatomy.norm(anatomy.top("final")).linear(step, acts["final.scale"][0])


def edges_of(model, d, acts, source):
    """The graph's edges from one active latent, with weights; and what each attention reads of it."""
    acted = d.encode({f"mlp_in.{source.block}": acts[f"mlp_in.{source.block}"][0]}, block=source.block)
    activation = acted.dense()[source.position, source.index]
    start = torch.zeros(LAST + 1, model.shape.d_model, dtype=torch.float64)
    start[source.position] = activation * d.decoder[source.block][f"mlp_out.{source.block}"][source.index]
    mlp_reads, attention_reads, final = linear(model, acts, start, source.block)
    found = {}
    for i, x in mlp_reads.items():
        moved = x @ d.encoder[i][f"mlp_in.{i}"].T
        found |= {Latent(i, t, p): moved[p, t] for t in range(LATENTS) for p in range(source.position, LAST + 1)}
    logits = final[LAST] @ model.weights.unembed
    found |= {Logit(t, LAST): logits[t] for t in TOKENS}
    weight = torch.stack([v.detach() for v in found.values()])
    return graph([Edge(source, t) for t in found], weight, unit="pre-activation"), start, attention_reads


def test_doubling_a_latent_moves_every_downstream_node_by_its_edge(run):
    model, d, acts = run
    code = d.encode({"mlp_in.0": acts["mlp_in.0"][0]}, block=0).dense()
    sources = [Latent(0, int(code[p].argmax()), p) for p in (0, 2, LAST)]
    frozen = [Freeze(a, acts) for a in model.places(FROZEN)]
    before, read = reads(model, d, frozen)
    for source in sources:
        g, step, attention = edges_of(model, d, acts, source)
        place = Address("mlp_out", source.block, position=source.position)
        after, moved = reads(model, d, [*frozen, Add(place, step[source.position])])
        assert g.weight.abs().max() > 1e-3
        for edge, weight in zip(g.edges, g.weight.tolist(), strict=True):
            assert abs(after[edge.target] - before[edge.target] - weight) < 1e-9, edge
        ends = {edge.target for edge in g.edges}
        still = [abs(after[n] - before[n]) for n in before if n not in ends]  # earlier layers and positions
        assert max(still) < 1e-12
        for i, x in attention.items():
            for site in ("q_in", "v_in"):  # each head's branch reads the step, divided by the frozen norm
                gap = (moved[f"{site}.{i}"] - read[f"{site}.{i}"])[0] - x[:, None]
                assert gap.abs().max() < 1e-9


def test_without_freezing_the_edges_are_not_the_whole_effect(run):
    model, d, acts = run
    code = d.encode({"mlp_in.0": acts["mlp_in.0"][0]}, block=0).dense()
    source = Latent(0, int(code[2].argmax()), 2)
    g, step, _ = edges_of(model, d, acts, source)
    (before, _), (after, _) = reads(model, d, []), reads(model, d, [Add("mlp_out.0@2", step[2])])
    gaps = [abs(after[e.target] - before[e.target] - w) for e, w in zip(g.edges, g.weight.tolist(), strict=True)]
    assert max(gaps) > 1e-4
