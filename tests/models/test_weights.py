"""Weights: the views reproduce what the model computed from what it read, plain and with norms folded in."""

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.anatomy.unembedding import unembedding
from tests.models.common import ALIBI, ALL, CAUSAL, IDS, gap, model, noise, sites, uncapped, widely

NO_ROPE = ("gpt2", "gpt_neo", "opt", "gpt_bigcode", "bert", *ALIBI)
FOLDABLE = [n for n in CAUSAL if not n.startswith("olmo2") and not n.startswith("olmo3")]


def apply(x, w, b):
    """x [batch position d_model] through [head d_model d_head], as [batch position head d_head]."""
    return torch.einsum("bpd,hde->bphe", x, w) + b


def projected(m, i, part):
    """What the projections return, before rotation and norms of queries and keys: hooked by hand."""
    kept, path = {}, m.anatomy.part(i, "fused") or m.anatomy.part(i, part)
    handle = path.register_forward_hook(lambda module, args, out: kept.update(out=out))
    m.run(IDS)
    handle.remove()
    out, s = kept["out"], m.shape
    width = {"q": s.n_heads, "k": s.n_kv_heads, "v": s.n_kv_heads}
    if m.anatomy.part(i, "fused") is None:
        return out.view(2, 7, width[part], s.d_head)
    if m.family.qkv == "concat":
        return out.split([n * s.d_head for n in width.values()], dim=-1)["qkv".index(part)].reshape(2, 7, -1, s.d_head)
    groups = out.view(2, 7, s.n_kv_heads, -1, s.d_head)
    return {"q": groups[:, :, :, :-2].reshape(2, 7, -1, s.d_head), "k": groups[..., -2, :], "v": groups[..., -1, :]}[
        part
    ]


@pytest.mark.parametrize("name", widely(ALL))
def test_projections_reproduce_queries_keys_and_values(name):
    m, i = model(name), 1
    acts = m.capture(IDS, [f"{s}.{i}" for s in ("attn_in", "q", "k", "v")])
    for part in "qkv":
        made = apply(acts[f"attn_in.{i}"], getattr(m.weights, part)[i], getattr(m.weights, f"{part}_bias")[i])
        assert gap(made, projected(m, i, part)) < 1e-5, part
        if part == "v" or name in NO_ROPE:
            scale = 1.0 if gap(made, acts[f"{part}.{i}"]) < 1e-5 else m.shape.d_head**-0.5  # OPT scales its queries
            assert gap(made * scale, acts[f"{part}.{i}"]) < 1e-5, part


@pytest.mark.parametrize("name", widely(CAUSAL))
def test_rotation_keeps_the_length_of_unrotated_queries(name):
    """Where queries are rotated and not normed, each head keeps its length: no two heads are mixed up."""
    m, i = model(name), 1
    if name in NO_ROPE or m.family.qk_norm or name == "gpt_neo":
        return
    acts = m.capture(IDS, [f"attn_in.{i}", f"q.{i}", f"k.{i}"])
    for part in "qk":
        made = apply(acts[f"attn_in.{i}"], getattr(m.weights, part)[i], getattr(m.weights, f"{part}_bias")[i])
        assert gap(made.norm(dim=-1), acts[f"{part}.{i}"].norm(dim=-1)) < 1e-5


@pytest.mark.parametrize("name", widely(ALL))
def test_outputs_reproduce_heads_and_neurons(name):
    m, i = model(name), 1
    acts = m.capture(IDS, sites(m))
    assert gap(torch.einsum("bphe,hed->bphd", acts[f"z.{i}"], m.weights.o[i]), acts[f"head_out.{i}"]) < 1e-5
    if f"mlp_post.{i}" not in acts:
        return
    w = m.weights
    assert gap(acts[f"mlp_in.{i}"] @ w.mlp_in[i] + w.mlp_in_bias[i], acts[f"mlp_pre.{i}"]) < 1e-5
    if f"mlp_gate.{i}" in acts:
        assert gap(acts[f"mlp_in.{i}"] @ w.mlp_gate[i] + w.mlp_gate_bias[i], acts[f"mlp_gate.{i}"]) < 1e-5
    if not (m.family.ln2_post or m.family.post_norm):
        out = (acts[f"mlp_post.{i}"] @ w.mlp_out[i] + w.mlp_out_bias[i]) * m.anatomy.multiplier
        assert gap(out, acts[f"mlp_out.{i}"]) < 1e-5


@pytest.mark.parametrize("name", FOLDABLE)
def test_folded_views_read_the_normalised_stream(name):
    m, i = model(name), 1
    w, acts = m.weights.folded(), m.capture(IDS, sites(m))

    def normalised(stream, ln):
        norm = m.anatomy.norm(m.anatomy.part(i, ln))
        return norm.centre(acts[f"{stream}.{i}"]) / acts[f"{ln}.scale.{i}"][..., None]

    for part in "qkv":
        made = apply(normalised("resid_pre", "ln1"), getattr(w, part)[i], getattr(w, f"{part}_bias")[i])
        assert gap(made, projected(m, i, part)) < 1e-5, part
    if f"mlp_pre.{i}" in acts:
        middle = "resid_mid" if f"resid_mid.{i}" in acts else "resid_pre"
        x = normalised(middle, "ln2" if f"ln2.scale.{i}" in acts else "ln1")
        assert gap(x @ w.mlp_in[i] + w.mlp_in_bias[i], acts[f"mlp_pre.{i}"]) < 1e-5


@pytest.mark.parametrize("name", widely(CAUSAL))
def test_unembedding_views_reproduce_the_logits(name):
    m = model(name)
    acts = m.capture(IDS, [f"resid_post.{m.shape.n_layers - 1}", "final.scale", "logits"])
    stream, logits = acts[f"resid_post.{m.shape.n_layers - 1}"], uncapped(m, acts["logits"])
    norm = m.anatomy.norm(m.anatomy.top("final"))
    read = norm.centre(stream) / acts["final.scale"][..., None]
    plain = (read * norm.weight + norm.bias) @ m.weights.unembed + m.weights.unembed_bias
    assert gap(plain, logits) < 2e-5
    if unembedding(m.anatomy).cap:
        with pytest.raises(Refused, match="soft cap"):
            _ = m.weights.folded().unembed
    elif name in FOLDABLE:
        folded = m.weights.folded()
        assert gap(read @ folded.unembed + folded.unembed_bias, logits) < 2e-5


def test_views_follow_the_models_own_storage():
    m = model("llama_gqa")
    assert m.weights.embed.data_ptr() == m.hf.model.embed_tokens.weight.data_ptr()
    assert m.weights.mlp_out[0].data_ptr() == m.hf.model.layers[0].mlp.down_proj.weight.data_ptr()
    assert m.weights.q[0].data_ptr() == m.hf.model.layers[0].self_attn.q_proj.weight.data_ptr()


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_7b", "gpt_bigcode"])
def test_circuits_are_the_products_they_name(name):
    m, i = model(name), 1
    group = m.shape.n_heads // m.shape.n_kv_heads
    for h in range(m.shape.n_heads):
        ov, qk = m.weights.ov(i, h), m.weights.qk(i, h)
        assert gap(ov.matrix, m.weights.v[i][h // group] @ m.weights.o[i][h]) < 1e-6
        assert gap(qk.matrix, m.weights.q[i][h] @ m.weights.k[i][h // group].T) < 1e-6
        u, s, vh = ov.svd()
        assert gap(u @ s.diag() @ vh, ov.matrix) < 1e-5
        assert gap(s, torch.linalg.svdvals(ov.matrix)[: len(s)]) < 1e-5
        assert gap(ov.norm(), ov.matrix.norm()) < 1e-5
        assert gap(qk.T.matrix, qk.matrix.T) == 0.0
        assert gap(noise(32) @ ov.left @ ov.right, noise(32) @ ov.matrix) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_bigcode"])
def test_all_heads_and_layers_at_once_are_the_single_ones(name):
    m = model(name)
    w, s = m.weights, m.shape
    layers, heads = range(s.n_layers), range(s.n_heads)
    assert w.q[:].shape == (s.n_layers, s.n_heads, s.d_model, s.d_head)
    for part in ("q", "v_bias", "o", "mlp_out", "mlp_in_bias"):
        stacked, view = getattr(w, part)[:], getattr(w, part)
        assert len(view) == s.n_layers
        assert torch.equal(stacked, torch.stack(list(view)))
        assert torch.equal(view[-1], stacked[-1])
        assert torch.equal(view[1:, 0], stacked[1:, 0])
    assert torch.equal(w.q[1, 2], w.q[1][2])
    for of in (w.ov, w.qk):
        every, values = of(), of().svd()[1]
        assert every.left.shape[:2] == (s.n_layers, s.n_heads) == values.shape[:2]
        for i in layers:
            layer = of(i)
            assert gap(layer.norm(), every[i].norm()) <= 2e-7
            for h in heads:
                for one in (of(i, h), of(i - s.n_layers, h - s.n_heads), layer[h], every[i, h]):
                    assert torch.equal(one.left, of(i, h).left)
                    assert torch.equal(one.right, of(i, h).right)
                assert gap(values[i, h], of(i, h).svd()[1]) < 1e-5
                assert torch.equal(every.T[i, h].left, of(i, h).T.left)


def test_layers_and_heads_that_are_not_there_are_refused():
    w = model("gpt2").weights
    for wrong in (lambda: w.q[99], lambda: w.ov(99), lambda: w.qk(0, 99), lambda: w.folded().o[-99]):
        with pytest.raises(Refused, match="use 0 to"):
            wrong()


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "olmo2", "cohere", "stablelm_parallel"])
def test_circuits_of_normed_queries_and_keys_are_refused(name):
    with pytest.raises(Refused, match="normed"):
        model(name).weights.qk(0, 0)
    assert model(name).weights.ov(0, 0).matrix.shape == (32, 32)


@pytest.mark.parametrize("name", ["olmo2", "olmo3", "bert"])
def test_folding_where_it_is_no_identity_is_refused(name):
    with pytest.raises(Refused, match="after the layers"):
        model(name).weights.folded()


def test_weights_that_a_family_lacks_are_refused():
    with pytest.raises(Refused, match="none there"):
        model("gpt2").weights.mlp_gate[0]
    with pytest.raises(Refused, match="none there"):
        model("mixtral").weights.mlp_out[0]
