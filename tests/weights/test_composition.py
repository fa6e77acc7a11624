"""Composition of heads: the plain formula multiplied out, the distribution of rotations, and a pair planted by hand."""

from __future__ import annotations

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.weights import composition
from tests.conformance import subjects


def plain(model: Model, sender: tuple[int, int], receiver: tuple[int, int], centre: bool) -> list[float]:
    """The Frobenius ratios for Q, K and V of one pair, on matrices multiplied out in float64."""
    w, d = model.weights.folded(), model.shape.d_model
    seen = torch.eye(d).double() - (1 / d if centre else 0)  # what a norm that subtracts the mean lets through
    ov, qk, values = (seen @ f.matrix.double() @ seen for f in (w.ov(*sender), w.qk(*receiver), w.ov(*receiver)))
    return [float((ov @ m).norm() / (ov.norm() * m.norm())) for m in (qk, qk.T, values)]


def gpt2() -> Model:
    """A random GPT-2, whose norms are not the identity."""
    model = subjects.family("gpt2")
    for i, block in enumerate(model.hf.transformer.h):
        block.ln_1.weight.data.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(i))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_scores_are_the_plain_formula(family):
    model = subjects.random_llama() if family == "llama" else gpt2()
    got = composition(model)
    for s, r in ((0, 1), (3, 2)):
        expected = plain(model, (0, s), (1, r), family == "gpt2")
        assert got.select(sender=f"0.{s}", receiver=f"1.{r}").score.flatten().tolist() == pytest.approx(expected, 1e-5)
    assert got.score[:, :4, :4].isnan().all(), "heads of one layer do not compose"
    assert got.score[:, -4:].isnan().all()
    assert got.record["dimensions"] == (31 if family == "gpt2" else 32)
    part = composition(model, senders="0.*", receivers="1.2")
    torch.testing.assert_close(part.z[..., 0], got.z[:, :4, 6])
    assert part.reasons["backward"]


@torch.no_grad()
def test_z_is_the_distance_from_whole_streams_that_were_rotated():
    model, n = subjects.random_llama(), 2000
    got = composition(model, senders="0.1", receivers="1.2", samples=n)
    w, g = model.weights.folded(), torch.Generator().manual_seed(0)
    ov, m = w.ov(0, 1).matrix.double(), w.qk(1, 2).matrix.double()
    turns = torch.linalg.qr(torch.randn(n, 32, 32, generator=g, dtype=torch.float64))[0]
    square = (ov @ turns @ m).square().sum((-2, -1)) / (ov.square().sum() * m.square().sum())
    score = got.score[0].item()
    assert float(square.mean()) == pytest.approx(1 / 32, rel=0.02)
    assert got.z[0].item() == pytest.approx((score**2 - 1 / 32) / float(square.std()), rel=0.1)
    null = got.null[0, 0, 0].double()
    assert float(null.std()) == pytest.approx(1, rel=0.1)
    assert float(null.mean()) == pytest.approx(0, abs=0.1)
    quartiles = torch.tensor([0.05, 0.25, 0.75, 0.95, 0.99]).double()
    theirs = ((square - 1 / 32) / square.std()).quantile(quartiles)
    torch.testing.assert_close(null.quantile(quartiles), theirs, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_a_planted_pair_is_first_by_z_where_the_raw_score_prefers_another():
    model, g = subjects.random_llama(spread=1.0), torch.Generator().manual_seed(1)
    first, then = (model.hf.model.layers[i].self_attn for i in (0, 1))
    written = torch.randn(32, 8, generator=g)
    first.o_proj.weight[:, 8:16] = written  # 0.1 writes into most of what the keys of 1.2 and 1.3 (one group) read
    then.k_proj.weight[8:] = (written + 0.5 * torch.randn(32, 8, generator=g)).T
    line, apart = torch.linalg.qr(torch.randn(32, 2, generator=g))[0].T
    first.o_proj.weight[:, 16:24] = line[:, None] * torch.randn(8, generator=g)  # 0.2 writes a line, 1.0 reads another
    then.v_proj.weight[:8] = torch.randn(8, 1, generator=g) * (0.6 * line + 0.8 * apart)
    got = composition(model)
    best = [(r["mode"], r["sender"], r["receiver"]) for r in got.top(2, by="z", largest=True)]
    assert sorted(best) == [("K", "0.1", "1.2"), ("K", "0.1", "1.3")]
    raw = got.top(1, by="score", largest=True)[0]
    assert (raw["mode"], raw["sender"]) == ("V", "0.2"), "one dimension aligns by chance where eight do not"
    assert float(got.select(mode="K", sender="0.1", receiver="1.2").z) > 2 * float(got.null.max())


def test_untrained_weights_compose_as_rotations_do():
    got = composition(gpt2())
    z = got.z[got.z.isfinite()]
    assert abs(float(z.mean())) < 0.3
    assert 0.8 < float(z.std()) < 1.25
    assert (got.backward[:, 0] < 0).all()
    assert (got.backward[:, 1] > 0).all()


def test_families_without_a_bilinear_form_have_values_only():
    model = subjects.family("qwen3")
    got = composition(model)
    assert got.z[:2].isnan().all()
    assert "normed" in got.reasons["Q"]
    assert got.reasons["K"]
    assert got.z[2].isfinite().any()


def test_a_head_that_writes_nothing_has_no_score_and_wrong_heads_are_refused():
    model = subjects.random_llama()
    with torch.no_grad():
        model.hf.model.layers[0].self_attn.o_proj.weight[:, :8] = 0
    got = composition(model)
    assert got.z[:, 0].isnan().all()
    assert got.z[:, 1, 4:].isfinite().all()
    for wrong in ("9.0", "mlp_out.0", "0.1@2", "heads"):
        with pytest.raises(Refused):
            composition(model, senders=wrong)


@torch.no_grad()
def test_z_of_a_circuit_of_low_rank_has_its_exact_moments():
    model, g = subjects.random_llama(spread=1.0), torch.Generator().manual_seed(1)
    line = torch.randn(32, generator=g)
    model.hf.model.layers[0].self_attn.v_proj.weight[:8] = torch.randn(8, 1, generator=g) * line
    got = composition(model, senders="0.0", receivers="1.2", samples=200)
    w = model.weights.folded()
    p, q = (f.matrix.double() for f in (w.ov(0, 0), w.ov(1, 2)))
    p, q = p.T @ p / p.square().sum(), q @ q.T / q.square().sum()
    spread = [float((x @ x).trace()) - 1 / 32 for x in (p, q)]
    expected = (float((p @ q).trace()) - 1 / 32) / (2 * spread[0] * spread[1] / (31 * 34)) ** 0.5
    assert got.z[2].item() == pytest.approx(expected, rel=1e-4)
    assert float(got.null[2].std()) == pytest.approx(1, abs=0.15)
