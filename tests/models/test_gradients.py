"""Gradients at every site equal central differences of the edits that move it, and leave no trace."""

from functools import cache

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.core.sites import BY_NAME
from cutaway.models.edits.library import Ablate, Add, Scale
from cutaway.models.model import Model
from tests.models.common import ALL, IDS, KINDS, PADDED, gap, metric, model, noise, sites, widely
from tests.models.tiny import build

STEP = 1e-4  # transformers computes root-mean-square norms in float32 even in a float64 model: no smaller


def slope(m, t, directions, edits=()):
    """The metric's central difference along a direction at every place, moved all at once."""
    up, down = (m.run_last(t, [*edits, *(Add(a, v, c) for a, v in directions.items())]) for c in (STEP, -STEP))
    return (metric(up) - metric(down)) / (2 * STEP)


def along(m, t, wanted, seed):
    """The places of some sites with a random direction each, and the gradients' prediction of every slope."""
    _, slopes, given = m.gradients(t, wanted, metric)
    directions = {a: noise(*given[a].shape[1:], seed=seed + i).double() for i, a in enumerate(map(str, slopes))}
    return directions, {a: (slopes[a] * v).flatten(1).sum(1) for a, v in directions.items()}


def writable(m):
    return [s for s in sites(m) if BY_NAME[s].writable]


def agree(difference, predicted):
    return float((difference - predicted).abs().max()) < 1e-2 * max(1.0, float(predicted.abs().max()))


@cache
def exact(name):
    """A float64 model; mixtures multiply their experts one by one, for their grouped product has no such form."""
    m = model(name, torch.float64)
    if m.family.router:
        m.hf.set_experts_implementation("eager")
    return m


@pytest.mark.parametrize("name", KINDS)
def test_each_site_has_the_gradient_of_its_edits(name):
    m = exact(name)
    directions, predicted = along(m, IDS, [str(m.places(s)[-1]) for s in writable(m)], seed=1)
    for a, v in directions.items():
        assert agree(slope(m, IDS, {a: v}), predicted[a]), a


@pytest.mark.parametrize("name", widely(ALL))
def test_all_sites_together_have_the_sum_of_their_gradients(name):
    """Small changes made at every place of the model at once change the metric by the sum of all slopes."""
    m = exact(name)
    places = [s for s in writable(m) if s not in ("logits", "scores")]
    directions, predicted = along(m, IDS, places, seed=7)
    scaled = {a: v / v.norm() for a, v in directions.items()}
    total = sum(predicted[a] / directions[a].norm() for a in directions)
    assert agree(slope(m, IDS, scaled), total)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "falcon_7b", "bert"])
def test_padding_moves_no_gradient(name):
    m = model(name, torch.float64)
    _, single, _ = m.gradients(PADDED["left"].row(1), "resid_pre", metric)
    for t in PADDED.values():
        _, padded, _ = m.gradients(t, "resid_pre", metric)
        for i in range(m.shape.n_layers):
            assert gap(padded[f"resid_pre.{i}"][1][t.mask[1]], single[f"resid_pre.{i}"][0]) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_7b", "granite", "phi3"])
def test_gradients_under_edits_are_those_of_the_edited_run(name):
    m = model(name, torch.float64)
    for place in ("head_out.1", "z.1", "attn_out.1", "ln1.scale.1", "mlp_out.1", "pattern.1", "q.1", "mlp_post.1"):
        edits = [Scale(place, 0.5), Ablate("head_out.0.1")]
        values, slopes, given = m.gradients(IDS, place, metric, edits)
        assert gap(values, metric(m.run_last(IDS, edits))) < 1e-9, place
        assert gap(given[place], m.capture(IDS, place, edits)[place]) < 1e-6, place
        v = noise(*given[place].shape[1:]).double()
        predicted = (slopes[place] * v).flatten(1).sum(1)
        assert agree(slope(m, IDS, {place: v}, edits), predicted), place


@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_keep_their_flags_and_their_grad(frozen):
    hf = build("llama")
    hf.requires_grad_(not frozen)
    m = Model(hf)
    marks = {n: torch.full_like(p, 3.0) for n, p in hf.named_parameters()}
    for n, p in hf.named_parameters():
        p.grad = marks[n].clone()
    frozen_values, slopes, _ = model("llama").gradients(IDS, "z", metric)
    values, same, _ = m.gradients(IDS, "z", metric)
    assert torch.equal(values, frozen_values)
    assert torch.equal(same["z"], slopes["z"])
    assert all(torch.equal(p.grad, marks[n]) and p.requires_grad is not frozen for n, p in hf.named_parameters())


def test_values_of_sites_that_are_written_over_are_those_before():
    """Falcon adds the attention's output into the MLP's."""
    m = model("falcon_7b")
    _, _, given = m.gradients(IDS, ["mlp_out", "attn_out"], metric)
    acts = m.capture(IDS, ["mlp_out", "attn_out"])
    assert all(torch.equal(given[a], acts[a]) for a in map(str, given))


def test_logits_and_embeddings_have_gradients_too():
    m = model("gpt2")
    for t in PADDED.values():
        _, slopes, given = m.gradients(t, ["logits", "embed", "pos_embed"], metric)
        last = slopes["logits"][torch.arange(2), t.last]
        assert gap(last[:, 3], torch.ones(2)) == 0.0
        assert float(slopes["logits"].abs().sum()) == pytest.approx(2 * 1.6)
        assert given["pos_embed"].shape == slopes["pos_embed"].shape == (2, 7, 32)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (lambda logits: logits.detach()[:, 0], "without a gradient"),
        (lambda logits: logits.sum(), "one number per prompt"),
        (lambda logits: logits[:, :2], "one number per prompt"),
    ],
)
def test_metrics_of_another_form_are_refused(wrong, word):
    m = model("llama")
    with pytest.raises(Refused, match=word):
        type(m).gradients(m, IDS, "z.1", wrong)


def test_a_site_behind_the_metric_is_refused():
    m = model("qwen2_moe")
    with pytest.raises(Refused, match="does not depend"):
        m.gradients(IDS, ["z.1", "pattern.2"], metric, edits=Ablate("attn_out.2"))
