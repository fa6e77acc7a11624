"""Selection against a sort of all pre-activations in float64, and the choice of precision."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutaway.dictionaries.kernels import precision
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.kernels.topk import Encoder, Shadow


def made(seed=0, tokens=70, d=24, latents=1024, scaled=False):
    g = torch.Generator().manual_seed(seed)
    w, b = torch.randn(latents, d, generator=g), 0.3 * torch.randn(latents, generator=g)
    scale = torch.rand(latents, generator=g) + 0.5 if scaled else None
    return torch.randn(tokens, d, generator=g), w, b, scale


def dense(x, w, b):
    return x.double() @ w.double().T + b.double()


def chosen(index, value):
    """The dense form of a choice."""
    out = torch.zeros(len(index), 1024, dtype=torch.float64)
    return out.scatter_add(1, index, value.double())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_top_k_is_the_top_k_of_all_pre_activations(scaled, signed, bf16):
    x, w, b, scale = made(scaled=scaled)
    pre = dense(x, w, b)
    ranked = pre if scale is None else pre * scale.double()
    best = (ranked.abs() if signed else ranked).topk(16).indices
    true = torch.zeros_like(pre).scatter(1, best, pre.gather(1, best))
    shadow = Shadow.of(w, b, scale) if bf16 else None
    index, value = select.top_k(x, Encoder(w, b, scale, shadow), 16, signed)
    assert torch.allclose(chosen(index, value), true if signed else true.relu(), atol=1e-5)


@given(st.integers(0, 500), st.sampled_from([1, 5, 16, 100]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_staged_choice_is_the_sorted_choice(seed, k, dtype):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(11, 1030, generator=g).to(dtype)
    scores[3] = 0
    scores[4] = -scores[4].abs()
    scores[5, 4:] = -1
    scores[6] = scores[6].round()  # many ties
    index, value = select.largest(scores, k)
    assert torch.equal(value.sort(1).values, scores.topk(k).values.float().relu().sort(1).values)
    positive = value > 0
    assert torch.equal(scores.gather(1, index)[positive].float(), value[positive])
    assert all(len(set(i[p].tolist())) == int(p.sum()) for i, p in zip(index, positive, strict=True))


def test_imports_of_ties_and_small_widths_are_left_to_a_sort():
    assert select._staged(torch.ones(4, 2048), 8) is None
    assert select._staged(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), 8) is None
    index, value = select.largest(torch.ones(4, 2048), 8)
    assert all(len(set(row.tolist())) == 8 for row in index)
    assert bool((value == 1).all())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("hint", [0.0, 0.1, 50.0])
def test_batch_top_k_is_the_top_of_the_whole_batch(scaled, bf16, hint):
    x, w, b, scale = made(1, scaled=scaled)
    x[3] *= 20  # most of the budget goes to one token
    n = 70 * 8
    pre = dense(x, w, b)
    ranked = pre if scale is None else pre * scale.double()
    least = ranked.reshape(-1).topk(n).values[-1]
    true = torch.where(ranked >= least, pre, 0)
    shadow = Shadow.of(w, b, scale) if bf16 else None
    pairs, value, floor = select.batch_top_k(x, Encoder(w, b, scale, shadow), n, hint)
    got = torch.zeros_like(pre)
    got[pairs.token, pairs.index] = value.double()
    assert torch.allclose(got, true, atol=1e-5)
    assert len(value) == n
    assert abs(floor - float(least)) < 1e-5
    assert int(pairs.indptr.diff()[3]) > 100


def test_batch_top_k_keeps_what_is_positive_if_that_is_less():
    x, w, b, _ = made(2)
    _, value, _ = select.batch_top_k(x, Encoder(w, b - 14), 70 * 400)
    positive = dense(x, w, b - 14) > 0
    assert 0 < len(value) == int(positive.sum()) < 70 * 400
    nothing, none, floor = select.batch_top_k(x, Encoder(w, b - 1000), 70)
    assert (len(none), floor, nothing.indptr.tolist()) == (0, 0.0, [0] * 71)


@pytest.mark.parametrize("scaled", [False, True])
def test_above_finds_what_passes_its_latents_floor(scaled):
    x, w, b, scale = made(4, scaled=scaled)
    floor = torch.rand(1024, generator=torch.Generator().manual_seed(9)) * 5
    pre = dense(x, w, b)
    passes = (pre if scale is None else pre * scale) > floor
    pairs, value = select.above(x, Encoder(w, b, scale), floor)
    token, latent = passes.nonzero(as_tuple=True)
    assert pairs.token.tolist() == token.tolist()
    assert pairs.index.tolist() == latent.tolist()
    assert torch.allclose(value.double(), pre[token, latent], atol=1e-5)
    assert pairs.indptr.tolist() == [0, *passes.sum(1).cumsum(0).tolist()]


def test_group_max_takes_the_best_of_each_group():
    x, w, b, _ = made(5)
    index, value = select.group_max(x, Encoder(w, b), 8)
    best = dense(x, w, b).unflatten(1, (8, 128)).max(-1)
    assert torch.equal(index, best.indices + 128 * torch.arange(8))
    assert torch.allclose(value.double(), best.values.relu(), atol=1e-5)


def test_more_tokens_than_a_chunk_give_the_same_as_one_by_one():
    x, w, b, _ = made(6, tokens=select.CHUNK + 3)
    whole = chosen(*select.top_k(x, Encoder(w, b), 4))
    parts = torch.cat([chosen(*select.top_k(x[i : i + 50], Encoder(w, b), 4)) for i in range(0, len(x), 50)])
    assert torch.allclose(whole, parts, atol=1e-5)


def test_a_shadow_follows_its_encoder():
    _, w, b, _ = made(7)
    shadow = Shadow.of(torch.zeros_like(w), b)
    shadow.refresh(w, b)
    assert torch.equal(shadow.rows, Shadow.of(w, b).rows)
    back = shadow.rows[:, -2].float() + shadow.rows[:, -1].float()
    assert np.allclose(back, b, rtol=1e-4)


def test_precision_is_chosen_by_measurement_and_restored(monkeypatch):
    x, w, b, _ = made(8)
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    choice = precision.measure(x, w, b, 16)
    assert switch.fp32_precision == before
    assert choice.onednn_error < 1e-2
    assert choice.select_same > 0.99
    with precision.products(precision.Choice(onednn=True)):
        assert switch.fp32_precision == "bf16"
    assert switch.fp32_precision == before
    monkeypatch.setattr(precision, "WORTH", 1e9)  # nothing is so much quicker
    slow = precision.measure(x, w, b, 16)
    assert (slow.onednn, slow.select) == (False, "float32")
    assert set(slow.as_dict()) == set(choice.as_dict())


def test_a_selection_that_chooses_other_latents_is_refused_by_the_measurement(monkeypatch):
    x, w, b, _ = made(8)
    monkeypatch.setattr(precision, "WORTH", 0.0)
    assert precision.measure(x, w, b, 16).select == "bfloat16"
    monkeypatch.setattr(Shadow, "refresh", lambda self, *_: self.rows.zero_())
    assert precision.measure(x, w, b, 16).select == "float32"


def test_chunks_that_share_a_product_are_chosen_from_as_if_alone(monkeypatch):
    g = torch.Generator().manual_seed(5)
    x, w, b = torch.randn(700, 16, generator=g), torch.randn(512, 16, generator=g), torch.randn(512, generator=g)
    together = select.top_k(x, select.Encoder(w, b), 4)
    products = []
    monkeypatch.setattr(torch, "mm", lambda a, *r, mm=torch.mm, **k: products.append(len(a)) or mm(a, *r, **k))
    monkeypatch.setattr(select, "PRODUCT", 0)
    alone = select.top_k(x, select.Encoder(w, b), 4)
    assert products == [256, 256, 188]
    assert torch.equal(together[0], alone[0])
    assert torch.allclose(together[1], alone[1], rtol=1e-5)
