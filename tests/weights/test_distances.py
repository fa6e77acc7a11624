"""Heads at a distance: the model's own scores on bare embeddings, and heads made to look at places or at tokens."""

from __future__ import annotations

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Ablate
from cutaway.models.model import Model
from cutaway.weights import circuits, distances, pair_scores, spectra
from tests.conformance import subjects
from tests.models.tiny import CONFIGS

IDS = [5, 9, 3, 7, 11, 30, 2, 8]
YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0, "original_max_position_embeddings": 16,
        "rope_theta": 1e4, "partial_rotary_factor": 0.5,
    }
}  # fmt: skip


def own_scores(model: Model, layer: int) -> torch.Tensor:
    """What the model computes where the layer reads nothing but the embeddings [head, q_pos, k_pos]."""
    off = [Ablate(f"{site}.{i}") for i in range(layer) for site in ("attn_out", "mlp_out")]
    return model.capture(subjects.numbered(*IDS), f"scores.{layer}", off)[f"scores.{layer}"][0]


@pytest.mark.parametrize("family", ["llama_gqa", "gpt_neox_parallel", "gptj", "glm", "gemma2", "smollm3"])
@torch.no_grad()
def test_scores_of_pairs_are_the_models_own(family):
    """Grouped heads, a part of the dimensions, both ways of pairing them, and layers without positions."""
    model, ids = subjects.family(family), torch.tensor(IDS)
    for layer in (0, model.shape.n_layers - 1):
        seen = own_scores(model, layer)
        for head in (0, model.shape.n_heads - 1):
            for offset in (0, 1, 3, 5):
                got = pair_scores(model, f"{layer}.{head}", ids, ids, offset)[range(offset, 8), range(8 - offset)]
                far = seen[head].diagonal(-offset)
                within = far > -1e9  # a window hides some
                torch.testing.assert_close(got[within], far[within], rtol=1e-3, atol=5e-5)


@torch.no_grad()
def test_profiles_and_shares_are_those_of_every_pair_multiplied_out():
    model, offsets = subjects.family("gpt_neox_parallel"), (0, 1, 2, 5)
    got = distances(model, heads="1.2", offsets=offsets, sources=0)
    every = torch.arange(model.shape.d_vocab)
    table = torch.stack([pair_scores(model, "1.2", every, every, o).double() for o in offsets])  # [offset, query, key]
    score = table.mean(-1) - table.mean(-1).mean(0)
    torch.testing.assert_close(got.score[0].double(), score.mean(1), rtol=1e-4, atol=1e-6)
    share = score.square().mean() / table.permute(1, 0, 2).flatten(1).var(1, correction=0).mean()
    assert float(got.share[0]) == pytest.approx(float(share), rel=1e-4)
    assert float((table[0] - table[3]).abs().max()) > 0.01, "a turn that is left out would be seen"


@torch.no_grad()
def test_a_head_that_looks_one_token_back_is_told_from_one_that_looks_at_tokens():
    model = subjects.random_llama(spread=1.0)
    hf, embed = model.hf, model.hf.model.embed_tokens.weight
    embed[:, 0] = 10.0 * embed.std()  # a direction that all tokens share, as trained models have
    attention = hf.model.layers[0].self_attn
    attention.q_proj.weight[:8] = attention.k_proj.weight[:8] = 0.0
    attention.k_proj.weight[:4, 0], attention.k_proj.weight[8:, 0] = 6.0, 0.0
    angle = hf.model.rotary_emb.inv_freq.float()
    attention.q_proj.weight[:4, 0], attention.q_proj.weight[4:8, 0] = 6 * angle.cos(), -6 * angle.sin()
    got = distances(model, heads="0.0,0.3", offsets=(0, 1, 2, 3, 4), samples=40)
    assert int(got.score[0].argmax()) == 1, "its queries are turned one token back"
    assert float(got.interval[0, 1, 0]) > float(got.null[0, 1].max())
    assert float(got.share_interval[0, 0]) > 0.9 > 0.2 > float(got.share[1])


def test_positions_that_are_not_rotary_and_wrong_offsets_are_refused():
    model = subjects.random_llama()
    for wrong in ({"offsets": (0, 64)}, {"offsets": (0,)}, {"heads": "9.0"}):
        with pytest.raises(Refused):
            distances(model, **wrong)
    for ask in (circuits, spectra):
        with pytest.raises(Refused, match="context has 64 tokens"):
            ask(model, heads="0.0", offset=64)
    for family, why in (("gpt2", "not rotary"), ("bloom", "not rotary"), ("qwen3", "normed")):
        with pytest.raises(Refused, match=why):
            distances(subjects.family(family))
        assert why in circuits(subjects.family(family), heads="0.0", offset=2).reasons["attends"]


@pytest.mark.parametrize(("offset", "rope"), [(3, {}), (0, YARN), (3, YARN)])
@torch.no_grad()
def test_token_pairs_at_a_distance_are_those_of_the_turned_table(offset, rope, monkeypatch):
    """YaRN scales the dimensions that positions turn, and no others, at every distance."""
    name, arguments = CONFIGS["gpt_neox_parallel"]
    monkeypatch.setitem(CONFIGS, "gpt_neox_parallel", (name, arguments | rope))
    model = subjects.family("gpt_neox_parallel")
    every = torch.arange(model.shape.d_vocab)
    got = circuits(model, heads="0.1", sources=0, pairs=4, offset=offset)
    table = pair_scores(model, "0.1", every, every, offset).double()
    best = ((table - table.mean(1, keepdim=True)) / table.std(1, correction=0, keepdim=True)).max(1)
    torch.testing.assert_close(got.strength[0, 0].double(), best.values.topk(4).values, rtol=1e-4, atol=1e-4)
    assert got.target[0, 0].tolist() == best.indices[best.values.topk(4).indices].tolist()
    plain = circuits(subjects.family("gpt_neox_parallel"), heads="0.1", sources=0, pairs=4, offset=3 - offset)
    assert got.target[0, 0].tolist() != plain.target[0, 0].tolist()


@torch.no_grad()
def test_streams_of_texts_show_a_head_what_embeddings_do_not():
    """Layer 0 writes one direction into every stream; a head of layer 1 compares places along it."""
    model = subjects.random_llama(spread=1.0)
    first, then = model.hf.model.layers
    first.mlp.down_proj.weight.zero_()
    first.mlp.gate_proj.weight.zero_()
    first.self_attn.o_proj.weight.zero_()
    first.self_attn.v_proj.weight.zero_()
    model.hf.model.embed_tokens.weight[:, 0] = 0.0
    first.self_attn.v_proj.bias = torch.nn.Parameter(torch.zeros(16))
    first.self_attn.v_proj.bias[0] = 1.0
    first.self_attn.o_proj.weight[0, 0] = 3.0
    angle = 2 * model.hf.model.rotary_emb.inv_freq.float()
    then.self_attn.k_proj.weight[:8], then.self_attn.q_proj.weight[:8] = 0.0, 0.0
    then.self_attn.k_proj.weight[:4, 0] = 6.0
    then.self_attn.q_proj.weight[:4, 0], then.self_attn.q_proj.weight[4:8, 0] = 6 * angle.cos(), -6 * angle.sin()
    bare, read = (distances(model, heads="1.0", offsets=(1, 2, 3, 4), texts=n, samples=40) for n in (0, 2))
    assert bare.score.abs().max() < 1e-4
    assert int(read.score[0].argmax()) == 2, "its queries are turned two tokens back"
    assert float(read.interval[0, 2, 0]) > float(read.null[0, 2].max())
    assert float(read.share_interval[0, 0]) > 0.9
