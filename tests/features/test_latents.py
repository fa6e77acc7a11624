"""Exchanging latents: against runs with hand-made steps, and against exchanging the whole site."""

from __future__ import annotations

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.dictionaries.gates import Relu, TopK
from cutaway.dictionaries.transforms import one_block
from cutaway.features import latents
from cutaway.models.edits.library import Add
from cutaway.patching import activation
from tests.conformance import subjects

SITE = "resid_post.1"


def run_by_hand(model, bound, d, latent, position=None):
    """The effect on every prompt of a latent's step, computed with dense codes in full runs."""
    own, donor = (model.capture(t, SITE)[SITE] for t in (bound.corrupt, bound.clean))
    f, g = (torch.relu(x @ d.encoder[0][SITE].T + d.b_enc[0]) for x in (own, donor))
    step = (g - f)[..., latent, None] * d.decoder[0][SITE][latent]
    edit = Add(SITE, step) if position is None else Add(f"{SITE}@{position}", step[:, position])
    return bound.metric(model.run_last(bound.corrupt, edit)) - bound.metric(model.run_last(bound.corrupt))


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2"])
def test_single_latents_by_hand(name):
    model, task = subjects.family(name), subjects.numbered_task()
    d, bound = subjects.dictionary(model.shape.d_model), task.bind(model)
    got = latents(model, task, d, latents="3,7", samples=2)
    assert got.labels["latent"] == [3, 7]
    for row, latent in enumerate((3, 7)):
        assert float(got.effect[row]) == pytest.approx(float(run_by_hand(model, bound, d, latent).mean()), abs=2e-5)
    placed = latents(model, task, d, latents="7", by="position", samples=1)
    assert placed.grid == ("latent", "position")
    for p in (2, 5):
        want = run_by_hand(model, bound, d, 7, p)
        assert float(placed.effect[0, p]) == pytest.approx(float(want.mean()), abs=2e-5)


def test_latents_and_error_together_are_the_site():
    """Decoder and encoder cancel nothing: all latents' steps plus the error's step exchange the activation itself."""
    model, task = subjects.family("llama_gqa"), subjects.numbered_task()
    d, bound = subjects.dictionary(model.shape.d_model, "resid_post.2"), task.bind(model)
    site = "resid_post.2"
    own, donor = (model.capture(t, site)[site] for t in (bound.corrupt, bound.clean))
    base = bound.metric(model.run_last(bound.corrupt))
    steps = [d.forward({site: x})[site] for x in (own, donor)]
    got = latents(model, task, d, latents="0", samples=1)
    for value, step in ((got.whole, steps[1] - steps[0]), (got.error, (donor - steps[1]) - (own - steps[0]))):
        want = bound.metric(model.run_last(bound.corrupt, Add(site, step))) - base
        assert float(value) == pytest.approx(float(want.mean()), abs=2e-5)
    both = Add(site, donor - own)
    site_effect = bound.metric(model.run_last(bound.corrupt, both)) - base
    last = activation(model, task, site="resid_post.2", by="position", samples=1).effect[0, -1]
    assert float(site_effect.mean()) == pytest.approx(float(last), abs=2e-5), "only the last position is read"


def test_the_largest_estimates_are_measured_and_controls_are_as_long():
    model, task = subjects.family("gpt2"), subjects.numbered_task()
    d = subjects.dictionary(model.shape.d_model)
    few, many = (latents(model, task, d, top=n, samples=3, direction="noise") for n in (4, 24))
    assert few.labels["latent"] == many.labels["latent"][:4]
    assert bool((many.estimate.abs().diff() <= 1e-6).all()), "the largest come first"
    assert len(many.effect) > 8
    assert float(torch.corrcoef(torch.stack([many.effect, many.estimate]))[0, 1]) > 0.5
    assert float(many.null.abs().max()) > 0


def test_a_transcoder_reads_one_site_and_writes_another():
    model, task = subjects.family("llama_gqa"), subjects.numbered_task()
    g, width = torch.Generator().manual_seed(0), model.shape.d_model
    rows = [torch.randn(20, width, generator=g) for _ in range(2)]
    d = one_block(
        {"mlp_in.1": rows[0]}, {"mlp_out.1": rows[1]}, torch.zeros(20), {"mlp_out.1": torch.zeros(width)}, TopK(4)
    )
    got = latents(model, task, d, top=5, samples=1)
    bound = task.bind(model)
    own, donor = (d.encode({"mlp_in.1": model.capture(t, "mlp_in.1")["mlp_in.1"].flatten(0, 1)}).dense()
                  for t in (bound.corrupt, bound.clean))  # fmt: skip
    i = got.labels["latent"][0]
    step = ((donor - own)[:, i, None] * rows[1][i]).reshape(len(task), -1, width)
    want = bound.metric(model.run_last(bound.corrupt, Add("mlp_out.1", step))) - bound.metric(
        model.run_last(bound.corrupt)
    )
    assert float(got.effect[0]) == pytest.approx(float(want.mean()), abs=2e-5)


def test_prompts_of_several_lengths_count_from_the_end():
    model, task = subjects.family("llama_gqa"), subjects.numbered_task(uneven=True)
    d = subjects.dictionary(model.shape.d_model)
    got = latents(model, task, d, latents="5", by="position", samples=1)
    alone = [latents(model, type(task)("one", (p,)), d, latents="5", by="position", samples=1) for p in task.pairs]
    mean = torch.stack([a.effect[0, -4:] for a in alone]).mean(0)
    torch.testing.assert_close(got.effect[0], mean, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("given", "why"), [("99", "no such latent"), ("x", "each a whole number")])
def test_latents_that_are_not_there_are_refused(given, why):
    model = subjects.family("gpt2")
    with pytest.raises(Refused, match=why):
        latents(model, subjects.numbered_task(), subjects.dictionary(model.shape.d_model), latents=given)


def test_a_dictionary_that_never_fires_is_refused():
    model = subjects.family("gpt2")
    rows = torch.randn(6, model.shape.d_model, generator=torch.Generator().manual_seed(0))
    silent = one_block({SITE: rows}, {SITE: rows}, torch.full((6,), -1e4), {SITE: torch.zeros(len(rows[0]))}, Relu())
    with pytest.raises(Refused, match="no latent differs"):
        latents(model, subjects.numbered_task(), silent)
