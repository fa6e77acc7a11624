"""Attribution patching against central differences, exact patching, and models where it has no error."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import cutaway as ca
from cutaway.core.refuse import OutOfMemory, Refused
from cutaway.core.stats import generator
from cutaway.interventions import first_order as linear
from cutaway.interventions.ablation_values import RandomStep
from cutaway.interventions.audit import Sample, agreement, drawn
from cutaway.patching import activation, attribution, attribution_star, relevance
from tests.conformance import subjects
from tests.patching.made import alike, straight


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def runs(model: Any, task: Any) -> tuple[Any, Any, Any]:
    """The bare model in double precision, and both prompts of the first pair as ids."""
    bound = task.bind(model)
    return model.hf.double(), bound, (bound.corrupt.ids[:1], bound.clean.ids[:1])


@contextmanager
def hooked(module: Any, change: Any, inside: bool) -> Any:
    """A plain torch hook on a module's input or output."""
    handle = (
        module.register_forward_pre_hook(lambda m, a: (change(a[0]), *a[1:]))
        if inside
        else module.register_forward_hook(lambda m, a, y: change(y))
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(("site", "inside"), [("z", True), ("mlp_out", False)])
def test_definition_by_central_differences(site, inside):
    model, task = subjects.random_llama(), subjects.llama_task(1)
    got = attribution(model, task, site=site, audit=0).effect
    hf, bound, (own_ids, donor_ids) = runs(subjects.random_llama(), task)
    answer, foil = int(bound.answers[0]), int(bound.foils[0])
    for layer, block in enumerate(hf.model.layers):
        module, kept = (block.self_attn.o_proj if inside else block.mlp), []

        def note(x: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(x.detach())
            return x

        with torch.no_grad(), hooked(module, note, inside):
            for ids in (own_ids, donor_ids):
                hf(ids)
        step = kept[1] - kept[0]
        for second in range(got.shape[1]):
            part = torch.zeros_like(step)
            where = (..., slice(second * 8, second * 8 + 8)) if inside else (slice(None), second)
            part[where] = step[where]
            values = []
            for e in (5e-3, -5e-3):  # norms round to single precision
                with torch.no_grad(), hooked(module, lambda x, e=e, part=part: x + e * part, inside):
                    logits = hf(own_ids).logits[0, -1]
                values.append(float(logits[answer] - logits[foil]))
            slope = (values[0] - values[1]) / 1e-2
            assert float(got[layer, second]) == pytest.approx(slope, rel=2e-3, abs=1e-3 * float(got.abs().max()))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", ["z", "v", "attn_out", "mlp_out", "resid_pre", "resid_post"])
def test_in_a_linear_model_it_is_activation_patching(site, direction):
    model, task = straight(), subjects.llama_task(3)
    estimated = attribution(model, task, site=site, direction=direction)
    exact = activation(model, task, site=site, direction=direction)
    assert close(estimated.effect, exact.effect)
    assert close(estimated.interval, exact.interval)
    assert exact.compare(estimated)["effect"]["pearson"] == pytest.approx(1.0)
    assert estimated.agreement.tolist() == pytest.approx([1.0, 1.0, 0.0, 1.0], abs=0.02)


@pytest.mark.parametrize("site", ["z", "v", "resid_pre", "mlp_out"])
def test_for_small_steps_it_is_activation_patching(site):
    task = subjects.llama_task(3)
    small = attribution(alike(subjects.random_llama(), task), task, site=site, audit=1000)
    assert close(small.effect, small.exact, 0.02)


def test_sites_together_are_sites_apart_from_one_backward():
    model, task = subjects.random_llama(), subjects.llama_task(3)
    both = attribution(model, task, site="z, mlp_out", audit=0)
    apart = [attribution(model, task, site=s, audit=0) for s in ("z", "mlp_out")]
    assert [r.grid for r in (both, *apart)] == [("node",), ("layer", "head"), ("layer", "position")]
    torch.testing.assert_close(both.effect, torch.cat([r.effect.flatten() for r in apart]))
    assert both.labels["node"][:2] == ["z.0.0", "z.0.1"]
    cost = both.record["cost"]
    assert (cost["forwards"], cost["backwards"]) == (6, 3)  # of three prompts: donor and target, one backward
    assert both.exact is None


def test_the_audit_measures_what_a_full_sweep_measures():
    model, task = subjects.random_llama(), subjects.llama_task(3)
    exact = activation(model, task, site="resid_pre").effect
    full, part = (attribution(model, task, site="resid_pre", audit=n) for n in (1000, 3))
    torch.testing.assert_close(full.exact, exact)
    x, y = full.effect.flatten().double(), exact.flatten().double()
    assert float(full.agreement[0]) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-5)
    least = 100 * 1.2e-7 * float(torch.stack([full.clean, full.corrupt]).abs().max())
    u, v = (torch.where(t.abs() > least, t, 0.0) for t in (x, y))
    assert (v == 0).any(), "before the change nothing has an effect"
    assert float(full.agreement[1]) == pytest.approx(stats.spearmanr(u, v)[0], abs=1e-5)
    assert float(full.agreement[2]) == pytest.approx(float((u.sign() != v.sign())[v != 0].float().mean()))
    assert (full.agreement_interval[:, 0] <= full.agreement + 1e-6).all()
    assert (full.agreement <= full.agreement_interval[:, 1] + 1e-6).all()
    seen = ~part.exact.isnan()
    assert int(seen.sum()) == 3
    torch.testing.assert_close(part.exact[seen], exact[seen])
    assert seen.flatten()[part.effect.abs().argmax()]
    assert "3 of" in part.record["audited"]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_null_of_exact_effects_are_random_steps_at_the_audited_places(direction):
    """By hand: the run with a step of the donor's length added there."""
    model, task = subjects.random_llama(), subjects.llama_task(3)
    found = attribution(model, task, audit=4, exact_null=True, samples=2, direction=direction)
    plain = attribution(model, task, audit=4, samples=2, direction=direction)
    assert torch.equal(found.exact.nan_to_num(), plain.exact.nan_to_num())
    assert plain.exact_null is None
    seen = ~found.exact.isnan()
    assert bool((found.exact_null.isfinite() == seen[..., None]).all())
    bound, where = task.bind(model), [f"z.{i}.{h}" for i, h in seen.nonzero().tolist()]
    target, giver = (bound.corrupt, bound.clean) if direction == "denoise" else (bound.clean, bound.corrupt)
    own, donor = (model.capture(t, "z") for t in (target, giver))
    seeds = torch.randint(1 << 62, (2, 4), generator=generator(0)).tolist()
    for cell, place in enumerate(where):
        for sample in range(2):
            new = own[place] + RandomStep(place, own[place], donor[place], seeds[sample][cell]).step()
            with model.edited(ca.models.Replace(place, new)):
                edited = model.measure(target, bound.measure)
            effect = edited - model.measure(target, bound.measure)
            got = found.exact_null[seen][cell, sample]
            assert float((effect.mean() - got).abs()) < 1e-4 * float(found.exact[seen].abs().max())


def test_the_sample_has_the_largest_and_some_of_every_rank():
    size = torch.tensor([0.0, 5.0, 1.0, 3.0, 2.0, 4.0, 0.0, 1e-9])
    assert drawn(size, 8) == drawn(size, 99) == Sample(tuple(range(8)), (0,) * 8, (8,))
    assert (drawn(size, 1).chosen, drawn(size, 1).sizes) == ((1,), (1, 7))
    assert {1, 5} < set(drawn(size, 4).chosen)
    assert drawn(size + 1e-9 * torch.rand(8), 4) == drawn(size, 4)
    big = drawn(torch.rand(300), 24, seed=3)
    assert (big.taken, big.sizes) == ((12, 4, 4, 4), (12, 96, 96, 96))
    assert big != drawn(torch.rand(300), 24, seed=4)
    assert float(big.weights.sum()) == pytest.approx(300)
    assert float(big.resampled(np.random.default_rng(0)).sum(1).std()) < 1e-6
    assert str(big) == "of all 300 cells, from 24 measured: the 12 largest, 12 drawn from 3 strata of the rest"


def test_only_places_that_move_are_drawn():
    size, moves = torch.rand(300), torch.rand(300) < 0.5
    some, many = drawn(size, 24, 3, moves), int(moves.sum())
    assert moves[list(some.chosen)].all()
    assert (some.places, some.still) == (many, 300 - many)
    assert str(some).startswith(f"of the {many} cells that move, from 24 measured: the 12 largest, 12 drawn from 3 str")
    assert str(drawn(size, 299, 3, moves)) == f"measured at the {many} cells that move"
    assert drawn(size, 300, 3, moves) == drawn(size, 300, 3)
    for all_alike in (torch.ones(300), torch.zeros(300)):
        assert drawn(size, 24, 3, all_alike.bool()) == drawn(size, 24, 3)


def test_the_audit_measures_no_stream_before_the_changed_word():
    model = subjects.miniworld()
    task = ca.tasks.from_sentence(model, "The capital of Norway is")
    found, bound = attribution(model, task, site="resid_pre", audit=12, samples=1), task.bind(model)
    changed = (bound.clean.ids != bound.corrupt.ids)[0]
    first = int(changed.nonzero()[0])
    assert first > 1, "the prompts begin alike"
    assert not found.exact[:, :first].isfinite().any()
    assert not found.exact[0, ~changed].isfinite().any(), "other tokens enter the first block unchanged"
    moving = model.shape.n_layers * (len(changed) - first) - int((~changed[first:]).sum())
    assert int(found.exact.isfinite().sum()) == min(12, moving)
    still = found.effect.numel() - moving
    assert f"; none of the {still} whose value is the same in both runs" in found.record["audited"]
    places = [f"resid_pre.{i}@0" for i in range(3)]
    alike = attribution(model, task, site=places, audit=2, samples=1)
    assert alike.record["audited"].endswith("no cell moves: every value is the same in both runs")
    assert alike.exact[alike.exact.isfinite()].tolist() == [0.0, 0.0]


def test_agreement_with_ties_is_scipys():
    a, b = torch.tensor([1.0, 1, 2, 3, 3, 5]), torch.tensor([0.0, 1, 1, -2, 4, 4])
    got, interval = agreement(a, b, drawn(a, 6))
    assert float(got[0]) == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-6)
    assert float(got[1]) == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-6)
    assert float(got[2]) == pytest.approx(1 / 5)
    assert float(got[3]) == pytest.approx(float((a * b).sum() / (a * a).sum()))
    assert torch.equal(interval, got[:, None].expand(4, 2)), "all were measured"
    assert agreement(a[:2], b[:2], drawn(a[:2], 2))[0][:2].isnan().all()


@pytest.mark.parametrize(("method", "site"), [(attribution, "z"), (relevance, "z"), (attribution, "mlp_post.1")])
def test_intervals_of_the_audit_hold_what_measuring_every_cell_gives(method, site):
    model = subjects.miniworld()
    task, by = ca.tasks.load("facts", model, 4), "both" if site == "z" else "auto"
    got = method(model, task, site=site, by=by, audit=10**6, samples=1)
    estimate, exact = got.effect.flatten(), got.exact.flatten()
    assert got.record["agreement"] == f"measured at all {len(exact)} cells"
    inside, points = [], []
    for seed in range(40):
        sample = drawn(estimate.abs(), 24, seed)
        assert len(sample.chosen) == 24 < len(exact)
        chosen = list(sample.chosen)
        value, interval = agreement(estimate[chosen], exact[chosen], sample, 1e-4)
        inside.append((interval[:, 0] <= got.agreement + 1e-6) & (got.agreement <= interval[:, 1] + 1e-6))
        points.append(value)
        assert (interval[:, 0] <= value + 1e-6).all()
        assert (value <= interval[:, 1] + 1e-6).all()
    assert (torch.stack(inside).float().mean(0) > 0.7).all()
    assert torch.stack(inside).float().mean() > 0.9
    assert (torch.stack(points).mean(0) - got.agreement).abs().max() < 0.06


def test_the_audit_says_the_scale_of_estimates_that_are_too_small():
    estimate = torch.linspace(-1, 1, 40)
    value, _ = agreement(estimate, 2.1 * estimate, drawn(estimate, 40))
    assert value.tolist() == pytest.approx([1.0, 1.0, 0.0, 2.1])


def test_miniworld_heads_stand_out_from_random_steps():
    model = subjects.miniworld()
    result = attribution(model, ca.tasks.load("induction", model, 8))
    assert float(result.agreement[0]) > 0.8
    assert (result.effect.abs() > result.null.abs().amax(-1)).any()


@pytest.mark.parametrize("site", ["z,nonsense", "mlp_post.1.999", "z,embed"])
def test_a_wrong_site_among_several_is_refused(site):
    with pytest.raises(Refused):
        attribution(subjects.random_llama(), subjects.llama_task(1), site=site)


def test_neurons_by_hand():
    """Slope times difference, summed over positions, neuron by neuron; the control has the difference's size."""
    model, task = subjects.family("llama_gqa"), subjects.numbered_task()
    got = attribution(model, task, site="mlp_post", audit=6, samples=2)
    bound = task.bind(model)
    _, slope, own = model.gradients(bound.corrupt, "mlp_post.1", bound.metric)
    step = model.capture(bound.clean, "mlp_post.1")["mlp_post.1"] - own["mlp_post.1"]
    products = slope["mlp_post.1"] * step
    torch.testing.assert_close(got.effect[1], products.sum(1).mean(0), atol=1e-6, rtol=1e-4)
    at = int(products.abs().sum((0, 1)).argmax())
    assert float(got.null[1, at].abs().max()) <= float(products[:, :, at].abs().sum(1).mean()) * (1 + 1e-5)
    exact = activation(model, task, site="mlp_post", samples=1).effect
    there = got.exact.isfinite()
    assert int(there.sum()) == 6
    torch.testing.assert_close(got.exact[there], exact[there], atol=1e-5, rtol=1e-4)


EVEN, UNEVEN = subjects.llama_task(3), subjects.uneven_task()
CASES = [
    (attribution, EVEN, {"by": "both"}),
    (relevance, UNEVEN, {"site": "mlp_post", "by": "position"}),
    (attribution_star, UNEVEN, {"by": "both"}),
    (attribution_star, EVEN, {"site": "k,resid_pre", "by": "position"}),
]


@pytest.mark.parametrize(("estimate", "task", "options"), CASES)
def test_prompts_in_parts_give_the_numbers_of_all_at_once(estimate, task, options, monkeypatch):
    """Effects, intervals, nulls and the audit; parts cost no forward more but those of the audit's donors."""
    options = {**options, "audit": 6, "samples": 2}
    once = estimate(subjects.random_llama(), task, **options)
    monkeypatch.setattr(linear, "_PART_BYTES", 1)
    sizes, whole = [], linear.slopes
    monkeypatch.setattr(
        linear, "slopes", lambda m, part, *a, **k: (sizes.append(len(part)), whole(m, part, *a, **k))[1]
    )
    apart = estimate(subjects.random_llama(), task, **options)
    assert sizes == [1, 1, 1]
    size = float(once.effect.abs().max())
    for name, t in once.tensors().items():
        wide = 16 if name.endswith("interval") else 1  # of 3 prompts it reaches as many times their rounding
        rtol = 1e-4 if name.startswith("agreement") else 1e-5  # ratios of small effects
        torch.testing.assert_close(getattr(apart, name), t, rtol=rtol, atol=wide * 1e-6 * max(size, 1), equal_nan=True)
    assert apart.record["audited"] == once.record["audited"]
    for name in ("forwards", "backwards"):
        assert -1 <= apart.record["cost"][name] - once.record["cost"][name] <= 3 + 1e-6


@pytest.mark.parametrize(("estimate", "site"), [(attribution, "z"), (attribution_star, "k")])
def test_memory_that_runs_out_halves_a_part(estimate, site, monkeypatch):
    """A forward takes two prompts at most."""
    task = subjects.llama_task(7)
    options = {"site": site, "audit": 4, "samples": 1}
    want = estimate(subjects.random_llama(), task, **options)
    model = subjects.random_llama()
    layer = type(model.hf.model.layers[0])
    forward, refused = layer.forward, []

    def small(self: Any, hidden_states: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if len(hidden_states) > 2:
            refused.append(len(hidden_states))
            raise torch.OutOfMemoryError("no more")
        return forward(self, hidden_states, *rest, **more)

    monkeypatch.setattr(layer, "forward", small)
    got = estimate(model, task, **options)
    assert refused[:2] == [7, 3], "the first part was halved and halved again"
    torch.testing.assert_close(got.effect, want.effect, rtol=1e-5, atol=1e-6 * float(want.effect.abs().max()))
    torch.testing.assert_close(got.exact, want.exact, rtol=1e-4, atol=1e-5, equal_nan=True)
    with monkeypatch.context() as several:
        several.setattr(linear, "processes", lambda: 2)  # one that halved alone would wait for the others for ever
        with pytest.raises(OutOfMemory, match="memory"):
            estimate(model, task, **options)

    def never(*rest: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(layer, "forward", never)
    with pytest.raises(OutOfMemory, match="memory"):
        estimate(model, task, **options)


@pytest.mark.parametrize(("site", "by"), [("z", "both"), ("v", "position"), ("mlp_post", "position")])
@pytest.mark.parametrize("task", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_cut_otherwise_it_is_still_activation_patching_in_a_linear_model(site, by, task):
    model = straight()
    estimated, exact = (f(model, task, site=site, by=by, samples=1) for f in (attribution, activation))
    assert type(estimated) is type(exact)
    assert close(estimated.effect, exact.effect)
    assert {k: v for k, v in estimated.labels.items() if k != "statistic"} == exact.labels
    assert estimated.agreement.tolist() == pytest.approx([1.0, 1.0, 0.0, 1.0], abs=0.02)
    assert f"24 of {estimated.effect.numel()} cells (" in estimated.record["audited"]


def test_cells_by_head_and_position_add_up_and_are_audited_by_themselves():
    model, task = subjects.random_llama(), subjects.llama_task(3)
    both = attribution(model, task, by="both", audit=7)
    assert both.grid == ("layer", "head", "position")
    assert both.exact is not None
    assert both.exact_interval is not None
    torch.testing.assert_close(both.effect.sum(-1), attribution(model, task, audit=0).effect)
    seen = both.exact.isfinite()
    assert int(seen.sum()) == 7
    exact = activation(model, task, site="z", by="both", samples=1)
    torch.testing.assert_close(both.exact[seen], exact.effect[seen], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.exact_interval[seen], exact.interval[seen], rtol=1e-3, atol=1e-4)


def test_patterns_that_name_their_places_are_entries_of_whole_sites():
    model, task = subjects.random_llama(), subjects.uneven_task()
    got = attribution(model, task, site="z.1.2@-1, mlp_post.*.3, resid_pre.1@-2, z.1.2@-1, k.1", audit=3)
    assert got.labels["node"][:4] == ["z.1.2 to@-1", "mlp_post.0.3", "mlp_post.1.3", got.labels["node"][3]]
    z, neurons, stream, keys = (
        attribution(model, task, site=s, by=b, audit=0).effect
        for s, b in (("z", "both"), ("mlp_post", "unit"), ("resid_pre", "auto"), ("k.1", "auto"))
    )
    want = torch.stack([z[1, 2, -1], neurons[0, 3], neurons[1, 3], stream[1, -2], *keys[0]])
    torch.testing.assert_close(got.effect, want)
    with pytest.raises(Refused, match="names its places itself"):
        attribution(model, task, site="z, z.1.2@-1", by="both")
    with pytest.raises(Refused, match="no units"):
        attribution(model, task, site="resid_pre", by="unit")
