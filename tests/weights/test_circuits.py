"""Token pairs of circuits: the whole product tokens × tokens, a head made to match and copy."""

from __future__ import annotations

import pytest
import torch

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models.anatomy.weights import Weights
from cutaway.models.circuits import ov
from cutaway.models.copying import copying
from cutaway.models.model import Model
from cutaway.weights import circuits
from tests.conformance import subjects


def whole_table(model: Model, layer: int, head: int) -> list[torch.Tensor]:
    """QK and OV of one head for every two tokens, multiplied out in float64 and standardised by row."""
    w, norm = model.weights.folded(), model.anatomy.norm(model.anatomy.part(layer, "ln1"))
    x = norm.centre(model.weights.embed.double())
    x = x / norm.scale(x)[:, None]
    u = w.unembed.double()
    if norm.centred:
        u = u - u.mean(0)
    queries = x @ w.q[layer, head].double() + w.q_bias[layer, head].double()
    kv = head // (model.shape.n_heads // model.shape.n_kv_heads)
    parts = [queries @ w.k[layer, kv].double().T @ x.T, x @ w.ov(layer, head).matrix.double() @ u]
    return [(p - p.mean(1, keepdim=True)) / p.std(1, correction=0, keepdim=True) for p in parts]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_pairs_and_own_strengths_are_those_of_the_whole_product(family):
    model = subjects.random_llama() if family == "llama" else subjects.family("gpt2")
    got = circuits(model, heads="1.*", sources=0, pairs=5)
    for side, expected in enumerate(whole_table(model, 1, 2)):
        assert float(got.same[side, 2]) == pytest.approx(float(expected.diagonal().mean()), abs=1e-4)
        best = expected.max(1)
        strength, source = best.values.topk(5)
        torch.testing.assert_close(got.strength[side, 2].double(), strength, rtol=1e-4, atol=1e-4)
        assert got.source[side, 2].tolist() == source.tolist()
        assert got.target[side, 2].tolist() == best.indices[source].tolist()
    some = circuits(model, heads="1.2", sources=7)
    ids = torch.linspace(0, model.shape.d_vocab - 1, 7).long()
    means = [float(x[ids, ids].mean()) for x in whole_table(model, 1, 2)]
    assert some.same[:, 0].tolist() == pytest.approx(means, abs=1e-4)


@torch.no_grad()
def test_a_head_that_matches_and_copies_by_hand_stands_out_of_exchanged_tokens():
    model = subjects.random_llama(spread=1.0)
    hf = model.hf
    hf.lm_head.weight.copy_(hf.model.embed_tokens.weight)
    layer = hf.model.layers[1].self_attn
    layer.q_proj.weight[:8] = layer.k_proj.weight[:8]  # 1.0 looks for keys like its query
    layer.o_proj.weight[:, :8] = layer.v_proj.weight[:8].T  # and writes what it reads
    got = circuits(model, heads="1.*", samples=20)
    head = got.select(head="1.0")
    assert (head.interval[:, 0, 0] > got.null.max()).all()
    assert (head.same[:, 0] > 3 * got.same[:, 1:].abs().max()).all()
    assert float(head.copying) == pytest.approx(1, abs=1e-4)
    source, target = got.pairs("1.0", "writes")[0]
    assert source == target == model.text.token_texts(head.source[1, 0, :1])[0]


def test_a_family_without_a_query_key_form_still_writes_and_wrong_heads_are_refused():
    got = circuits(subjects.family("qwen3"), heads="0.*")
    assert got.same[0].isnan().all()
    assert "normed" in got.reasons["attends"]
    assert got.same[1].isfinite().all()
    with pytest.raises(Refused, match="outside"):
        circuits(subjects.random_llama(), heads="7.0")
    with pytest.raises(Refused, match="9"):
        got.pairs("9.9")


@torch.no_grad()
def test_a_pair_reads_on_to_what_the_head_writes_and_a_layer_is_read_once(monkeypatch):
    model, read = subjects.random_llama(), list[int]()
    for name in ("ov", "qk"):
        whole = getattr(Weights, name)
        monkeypatch.setattr(Weights, name, lambda w, i, whole=whole: read.append(i) or whole(w, i))
    got = circuits(model, pairs=3, sources=9)
    monkeypatch.undo()
    assert sorted(read) == [0, 0, 0, 1, 1, 1], "once for its matches, once for what it writes, once for copying"
    expected = whole_table(model, 1, 2)[1][got.target[0, 6]].max(1)
    assert got.written[6].tolist() == expected.indices.tolist()
    torch.testing.assert_close(got.written_strength[6].double(), expected.values, rtol=1e-4, atol=1e-4)
    chain = got.chains("1.2")[0]
    assert chain[:2] == got.pairs("1.2")[0]
    assert chain[2] == model.text.token_texts(got.written[6, :1])[0]


@torch.no_grad()
def test_copying_folds_the_final_norm_also_under_a_soft_cap():
    model = subjects.family("gemma2")  # a soft cap follows its logits, which folds into no weight
    model.anatomy.top("final").weight.uniform_(-0.9, 3.0, generator=torch.Generator().manual_seed(0))
    scores, _ = copying(model, [1], 1, 0)
    rows = model.anatomy.unembed.weight.double() * (1 + model.anatomy.top("final").weight.double())
    circuit = model.weights.folded().ov(1, 2)
    behind = 1 + model.anatomy.part(1, "ln1_post").weight.double()
    values = torch.linalg.eigvals(
        (circuit.right.double() * behind) @ rows.T @ model.weights.embed.double() @ circuit.left.double()
    )
    assert float(scores[0, 2]) == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-4)


@torch.no_grad()
def test_what_a_head_writes_goes_through_the_norm_behind_attention():
    model = subjects.family("gemma2")
    layer = model.hf.model.layers[1]
    z = torch.randn(3, model.shape.d_head, generator=torch.Generator().manual_seed(0))
    alone = torch.zeros(3, model.shape.n_heads, model.shape.d_head)
    alone[:, 2] = z
    out = layer.self_attn.o_proj(alone.flatten(1))
    scale = model.anatomy.norm(layer.post_attention_layernorm).scale(out)[:, None]
    written = layer.post_attention_layernorm(out)
    assert float((written - out / scale).abs().max()) > 1e-3, "its weight is not the identity"
    ours = z @ ov(model, [Address("z", 1, 2)]).right[0]
    torch.testing.assert_close(ours / scale, written, rtol=1e-4, atol=1e-5)
