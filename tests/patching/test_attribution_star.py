"""AtP*: exact attention for queries and keys, and scores that survive cancellation, against plain torch."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import cutaway as ca
from cutaway.models.edits.library import Replace
from cutaway.patching import (
    activation,
    attribution,
    attribution_star,
)
from cutaway.patching.attribution_star import _Moved
from tests.conformance import subjects
from tests.patching.made import alike, straight


@pytest.mark.parametrize(("site", "direction"), [("q", "denoise"), ("q", "noise"), ("k", "noise")])
def test_the_fix_finds_what_saturated_attention_hides(site, direction):
    """Sharp attention, and nothing nonlinear after the last layer's pattern."""
    model, task = straight(attention=40.0), subjects.llama_task(3)
    options = {"site": site, "direction": direction}
    exact = activation(model, task, **options).effect[-1]
    fixed, plain = attribution_star(model, task, **options), attribution(model, task, **options).effect[-1]
    torch.testing.assert_close(fixed.effect[-1], exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
    top = int(exact.abs().argmax())
    assert float(exact[top].abs()) > 1, "there is something to find"
    assert float((plain[top] - exact[top]).abs()) > 0.9 * float(exact[top].abs()), "a gradient misses it"


def test_the_fix_counts_a_key_for_every_head_that_shares_it():
    model, task = subjects.random_llama(), subjects.llama_task(2)
    got = attribution_star(model, task, site="k")
    assert got.effect.shape == (2, 2)
    bound = task.bind(model)
    places = ["pattern.0", "resid_pre.0"]
    metric = bound.metric
    _, slopes, own = model.gradients(bound.corrupt, places, metric)
    donor = model.capture(bound.clean, "k.0")
    new = model.capture(bound.corrupt, "pattern.0", edits=[Replace("k.0.1", donor["k.0.1"])])
    by_hand = (slopes["pattern.0"] * (new["pattern.0"] - own["pattern.0"]))[:, 2:].sum((1, 2, 3)).mean()
    assert float(got.effect[0, 1]) == pytest.approx(float(by_hand), rel=1e-4)


@pytest.mark.parametrize("site", ["z", "mlp_out", "resid_pre"])
def test_elsewhere_the_effect_is_that_of_attribution(site):
    model, task = subjects.random_llama(), subjects.llama_task(3)
    star, plain = (f(model, task, site=site, audit=0) for f in (attribution_star, attribution))
    assert star.grid == ("layer", "head" if site == "z" else "position")
    for field in ("effect", "interval", "null"):
        torch.testing.assert_close(getattr(star, field), getattr(plain, field), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["q", "k"])
def test_for_small_steps_the_fix_changes_nothing(site):
    task = subjects.llama_task(3)
    model = alike(subjects.random_llama(), task)
    fixed, plain = (f(model, task, site=site, audit=0).effect for f in (attribution_star, attribution))
    torch.testing.assert_close(fixed, plain, rtol=0.02, atol=0.01 * float(plain.abs().max()))


def test_scores_by_plain_hooks():
    """One autograd run a dropped layer, its attention and MLP outputs detached."""
    model, task = subjects.random_llama(), subjects.llama_task(2)
    got = attribution_star(model, task, site="z", audit=0).score
    bound = task.bind(model)
    step = (model.capture(bound.clean, "z").stack("z") - model.capture(bound.corrupt, "z").stack("z")).detach()
    total = torch.zeros(2, 4)
    for drop in range(2):
        kept: list[torch.Tensor] = []
        layers = model.hf.model.layers
        with ExitStack() as stack:
            for block in layers:
                hook = block.self_attn.o_proj.register_forward_pre_hook(lambda m, a, kept=kept: kept.append(a[0]))
                stack.callback(hook.remove)
            for module in (layers[drop].self_attn.o_proj, layers[drop].mlp):
                stack.callback(module.register_forward_hook(lambda m, a, y: y.detach()).remove)
            bound.metric(model.hf(bound.corrupt.ids).logits[:, -1]).sum().backward(inputs=kept[1 - drop])
        grad = kept[1 - drop].grad
        assert grad is not None
        product = grad.view(step[0].shape) * step[1 - drop]
        total[1 - drop] += product.sum((1, 3)).abs().mean(0)
    torch.testing.assert_close(got, total, rtol=1e-4, atol=1e-5)


def test_a_place_whose_effects_cancel_keeps_its_score():
    """The second MLP takes back nearly all that the stream holds, so a gradient sees next to nothing."""
    model, task = straight(), subjects.llama_task(3)
    block = model.hf.transformer.h[1]
    with torch.no_grad():
        block.attn.c_proj.weight.zero_()
        block.mlp.c_fc.weight.zero_()
        block.mlp.c_fc.weight[:, :32] = torch.eye(32)
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.weight[:32] = -0.999 * torch.eye(32)
    result = attribution_star(model, task, site="z")
    assert float(result.effect[0].abs().max()) < 2e-3 * float(result.score[0].max())
    assert result.labels["statistic"][-1] == "spearman of score"


def test_on_miniworlds_ioi_queries_the_fix_is_closer_to_exact_effects():
    model = subjects.miniworld()
    task = ca.tasks.load("ioi", model, 6)
    plain, fixed = (f(model, task, site="q", audit=24).agreement for f in (attribution, attribution_star))
    assert float(fixed[0]) > float(plain[0]) + 0.2


@pytest.mark.parametrize(("site", "direction"), [("q", "denoise"), ("k", "noise")])
def test_at_one_position_the_fix_is_exact_in_a_last_layer(site, direction):
    """The nodes of the paper: sharp attention, one head and one position at a time."""
    model, task = straight(attention=40.0), subjects.llama_task(3)
    options = {"site": site, "by": "both", "direction": direction, "samples": 1}
    exact = activation(model, task, **options).effect[-1]
    fixed = attribution_star(model, task, **options)
    assert fixed.grid == ("layer", "head", "position")
    torch.testing.assert_close(fixed.effect[-1], exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
    assert float(exact.abs().max()) > 1, "there is something to find"
    assert fixed.labels["statistic"][-1] == "spearman of score"
    assert "by ranks of score: 16 of 96 cells (16 of 16); none of the 80" in fixed.record["audited"]


@pytest.mark.parametrize("task", [subjects.llama_task(2), subjects.uneven_task()], ids=["even", "uneven"])
def test_one_key_by_a_run_of_its_own(task):
    """Every key of every position exchanged alone, the pattern read, and its change times its slope."""
    model = subjects.random_llama()
    got = attribution_star(model, task, site="k", by="both", audit=0, samples=1)
    bound = task.bind(model)
    _, slopes, own = model.gradients(bound.corrupt, ["pattern", "resid_pre"], bound.metric)
    donor = model.capture(bound.clean, "k")
    streams = [Replace(f"resid_pre.{i}", own[f"resid_pre.{i}"]) for i in range(2)]
    columns = got.effect.shape[-1]
    for layer in range(2):
        for p in range(-columns, 0):
            edit = Replace(f"k.{layer}.1@{p}", donor[f"k.{layer}.1@{p}"])
            new = model.capture(bound.corrupt, f"pattern.{layer}", edits=[*streams, edit])[f"pattern.{layer}"]
            effect = (slopes[f"pattern.{layer}"] * (new - own[f"pattern.{layer}"])).sum((1, 2, 3)).mean()
            assert float(got.effect[layer, 1, p]) == pytest.approx(float(effect), rel=1e-3, abs=1e-4)


def test_one_score_moved_alone_in_closed_form():
    """Saturated rows, masked keys, and a sink that is no key, against softmaxes done one by one."""
    g = torch.Generator().manual_seed(0)
    scores, slope = (torch.randn(1, 2, 5, 5, generator=g, dtype=torch.double) for _ in range(2))
    scores[:, :, 2] *= 60  # far beyond what single precision holds beside 1
    new = scores + 30 * torch.randn(scores.shape, generator=g, dtype=torch.double)
    for x in (scores, new):
        x[..., 4] = torch.finfo(torch.float).min
    for sink in (None, 0.5):

        def pattern(s: torch.Tensor, sink: float | None = sink) -> torch.Tensor:
            whole = s if sink is None else torch.cat([s, torch.full_like(s[..., :1], sink)], -1)
            return whole.softmax(-1)[..., : s.shape[-1]]

        got = _Moved.of(scores, new, pattern(scores)).effect(slope)
        for j in range(5):
            moved = scores.clone()
            moved[..., j] = new[..., j]
            want = (slope * (pattern(moved) - pattern(scores))).sum(-1)
            torch.testing.assert_close(got[..., j], want, rtol=1e-8, atol=1e-8)


def test_several_sites_are_sites_apart():
    model, task = subjects.random_llama(), subjects.llama_task(3)
    both = attribution_star(model, task, site="z,q", by="both", audit=5, samples=2)
    apart = [attribution_star(model, task, site=s, by="both", audit=0, samples=2) for s in ("z", "q")]
    assert both.grid == ("node",)
    for name in ("effect", "score", "interval", "score_interval"):
        torch.testing.assert_close(getattr(both, name), torch.cat([getattr(r, name).flatten(0, 2) for r in apart]))
    assert both.labels["node"][0] == "z.0.0 <s>"
    assert (both.score_interval[:, 0] <= both.score + 1e-6).all()
    assert both.score_null.shape == (both.score.numel(), 2)
