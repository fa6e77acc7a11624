"""Spectra of circuits: the product decomposed, a direction planted by hand, and rotations that keep both sides."""

from __future__ import annotations

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.weights import spectra
from tests.conformance import subjects


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_values_and_tokens_are_those_of_the_product_multiplied_out(family):
    model = subjects.random_llama() if family == "llama" else subjects.family("gpt2")
    got, w, d = spectra(model, heads="1.*", directions=2, tokens=4), model.weights.folded(), model.shape.d_model
    norm = model.anatomy.norm(model.anatomy.part(0, "ln1"))
    seen = torch.eye(d).double() - (1 / d if norm.centred else 0)  # what a norm that subtracts the mean lets through
    x = norm.centre(model.weights.embed.double())
    x = x / norm.scale(x)[:, None]
    sides = {"attends": (w.qk(1, 2), x, x), "writes": (w.ov(1, 2), x, w.unembed.double().T)}
    for c, (form, *tables) in enumerate(sides.values()):
        u, s, vh = torch.linalg.svd(seen @ form.matrix.double() @ seen)
        rank = s.square().sum() ** 2 / s.pow(4).sum()
        torch.testing.assert_close(got.value[c, 2].double(), s[: model.shape.d_head], rtol=1e-4, atol=1e-5)
        assert float(got.rank[c, 2]) == pytest.approx(float(rank), rel=1e-4)
        y = torch.stack([t @ v for t, v in zip(tables, (u[:, 1], vh[1]), strict=True)])
        z = (y - y.mean(1, keepdim=True)) / y.std(1, correction=0, keepdim=True)
        z = z if z.amax(1).sum() > -z.amin(1).sum() else -z
        torch.testing.assert_close(got.strength[c, 2, :, 1].double(), z.topk(4).values, rtol=1e-3, atol=1e-3)
        assert got.token[c, 2, :, 1, 0].tolist() == z.argmax(1).tolist()


@pytest.mark.parametrize("gain", [1.0, 1.5])
@torch.no_grad()
def test_at_a_distance_queries_are_turned_against_keys(gain):
    """A gain, as in YaRN, is on queries and on keys, at distance zero too."""
    model = subjects.random_llama()
    model.hf.model.rotary_emb.attention_scaling = gain
    (near,), (far,) = (spectra(model, heads="1.2", offset=n, samples=2).value[:1] for n in (0, 3))
    w, d = model.weights.folded(), model.shape.d_head
    angle = 3 / model.hf.config.rope_parameters["rope_theta"] ** (torch.arange(0, d, 2).double() / d)
    turn = torch.zeros(d, d).double()
    for i, a in enumerate(angle):  # halves of a head are paired
        j = i + d // 2
        turn[i, i] = turn[j, j] = a.cos()
        turn[i, j], turn[j, i] = a.sin(), -a.sin()
    q, k = w.qk(1, 2).left.double(), w.qk(1, 2).right.double()
    for got, between in ((far, turn), (near, torch.eye(d).double())):
        values = gain**2 * torch.linalg.svdvals(q @ between @ k)[:d]
        torch.testing.assert_close(got[0].double(), values, rtol=1e-4, atol=1e-5)
    assert float((far - near).abs().max()) > 1e-3


@torch.no_grad()
def test_a_direction_planted_between_two_tokens_is_first_and_outside_the_null():
    model = subjects.random_llama(spread=1.0)
    hf, attention = model.hf, model.hf.model.layers[1].self_attn
    first, second = 7, 11
    read = torch.nn.functional.normalize(hf.model.embed_tokens.weight[first], dim=0)
    written = torch.nn.functional.normalize(hf.lm_head.weight[second], dim=0)
    attention.v_proj.weight[0] += 4 * read
    attention.o_proj.weight[:, 0] += 4 * written
    got = spectra(model, heads="1.0,1.3", samples=40)
    reads, writes = got.tokens("1.0")
    assert (reads[0], writes[0]) == tuple(model.text.token_texts([first, second]))
    assert float(got.value[1, 0, 0]) > float(got.null[1, 0, 0].max()), "one side is laid to the other"
    assert got.rank[1, 0] < got.rank_null[1, 0].min()
    assert float(got.strength[1, 0, 0, 0, 0]) > float(got.strength_null[1, 0, 0].mean())
    other = got.select(head="1.3")
    low, high = other.null[1, 0].min(-1).values, other.null[1, 0].max(-1).values
    inside = (other.value[1, 0] >= low) & (other.value[1, 0] <= high)
    assert inside.float().mean() > 0.6, "weights that nobody trained are like rotated ones"
    # A rotation keeps the singular values of both factors, so their determinant: the product of all values.
    logs = got.null[1].double().log().sum(1)
    torch.testing.assert_close(logs, got.value[1].double().log().sum(1)[:, None].expand_as(logs), rtol=1e-3, atol=1e-2)


def test_a_family_without_a_query_key_form_has_values_only_and_wrong_questions_are_refused():
    got = spectra(subjects.family("qwen3"), heads="0.*")
    assert got.value[0].isnan().all()
    assert "normed" in got.reasons["attends"]
    assert got.value[1].isfinite().all()
    with pytest.raises(Refused):
        got.tokens("9.9")
    with pytest.raises(Refused, match="encoder"):
        spectra(subjects.family("bert"))
