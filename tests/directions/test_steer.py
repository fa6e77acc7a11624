"""Dose and response: by hand-written hooks, strength 0 bit for bit, a trained model's sentiment, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cutaway as ca
from cutaway.directions.steer import _form
from tests.conformance.subjects import llama_task, miniworld, random_llama
from tests.directions.made import asked, seeded, sentiment

NEUTRAL = ["Mary and John went to the store", "Anna gave the letter"]


def hooked(model: Any, text: str, step: torch.Tensor, last: bool) -> torch.Tensor:
    """The logits with a step added behind layer 0."""

    def hook(module: Any, args: Any, out: Any) -> Any:
        h = (out if isinstance(out, torch.Tensor) else out[0]).clone()
        h[:, -1 if last else slice(None)] += step
        return h if isinstance(out, torch.Tensor) else (h, *out[1:])

    handle = model.hf.model.layers[0].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model.hf(model.tokens(text).ids).logits[0].float()
    finally:
        handle.remove()


@pytest.mark.parametrize("last", [False, True])
def test_effects_slopes_and_perplexity_are_what_a_bias_by_hand_makes(last):
    model, task, strengths = random_llama(), llama_task(2), (-1.0, 0.0, 0.5)
    direction = ca.directions.direction({"resid_post.0": seeded(3, 32)})
    got = ca.directions.steer(
        model, task, direction, NEUTRAL, strengths=strengths, last=last, samples=2, instruction="Then Emma said that "
    )
    bound, v = task.bind(model), direction.vector[0]
    change, losses = torch.zeros(len(strengths), len(task)), torch.zeros(len(strengths), len(NEUTRAL))
    for i, s in enumerate(strengths):
        for j, pair in enumerate(task):
            a, f = bound.answers[j], bound.foils[j]
            now, own = (hooked(model, pair.clean, x * v, last)[-1] for x in (s, 0.0))
            change[i, j] = (now[a] - now[f]) - (own[a] - own[f])
        for j, text in enumerate(NEUTRAL):
            ids = model.tokens(text).ids[0, 1:, None]
            now, own = (-hooked(model, text, x * v, last)[:-1].log_softmax(-1).gather(-1, ids) for x in (s, 0.0))
            losses[i, j] = (now - own).sum()
    counts = torch.tensor([model.tokens(t).ids.shape[1] - 1 for t in NEUTRAL])
    torch.testing.assert_close(got.effect, change.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.slope, (-change[0] + 0.5 * change[2]) / 1.25, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.perplexity, (losses.sum(1) / counts.sum()).exp(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.loss, (losses / counts).T, rtol=1e-3, atol=1e-4)
    said = [hooked(model, "Then Emma said that " + p.clean, 0 * v, last)[-1] for p in task]
    prompted = torch.stack([x[a] - x[f] for x, a, f in zip(said, bound.answers, bound.foils, strict=True)])
    assert float(got.prompted) == pytest.approx(float((prompted - got.clean).mean()), rel=1e-3)


def test_strength_0_changes_no_bit():
    model, task = random_llama(), llama_task(2)
    direction = ca.directions.direction({f"resid_post.{i}": seeded(i, 32) for i in range(2)})
    got = ca.directions.steer(model, task, direction, NEUTRAL, strengths=(0.0, 1.0), samples=3)
    assert got.effect[0] == 0
    assert got.perplexity[0] == 1
    assert not got.null[0].any()
    assert not got.loss[:, 0].any()
    plain, edited = (model.run(p.clean, edits=e) for p in task.take(1) for e in ((), direction.add(0.0)))
    assert torch.equal(plain, edited)


def test_sentiment_of_a_trained_model_follows_its_direction_and_not_random_ones():
    model, direction = miniworld(), sentiment().select(address=["resid_post.1"])
    facts = [p.clean for p in model.world.prompts("fact", 6)]
    got = ca.directions.steer(model, asked(12), direction, facts, strengths=(-10.0, 0.0, 10.0), samples=4)
    assert float(got.mean_slope_interval[0]) > 0
    assert float(got.mean_slope) > float(got.mean_slope_null.max())
    assert float(got.anti_steerable) < float(got.anti_steerable_null.mean())
    assert got.form == "rises throughout"
    assert bool(got.prompted.isnan())
    assert "instruction" in got.reasons["prompted"]


@pytest.mark.parametrize(
    ("effect", "form"),
    [
        ((0.0, 1.0, 2.0, 3.0), "rises throughout"),
        ((3.0, 2.0, 1.0, 0.9), "falls throughout; flat above 1"),
        ((0.0, 0.1, 2.0, 1.0), "turns at 1; flat below -1"),
    ],
)
def test_the_form_is_said_in_words(effect, form):
    assert _form((-2.0, -1.0, 1.0, 2.0), torch.tensor(effect) * torch.tensor(1.0)) == form


def test_what_cannot_be_steered_is_refused():
    model, task = random_llama(), llama_task(2)
    one, other = (ca.directions.direction({"resid_post.0": seeded(0, n)}) for n in (32, 16))
    for strengths in ((1.0,), (1.0, 0.0)):
        with pytest.raises(ca.Refused, match="they do not ascend"):
            ca.directions.steer(model, task, one, NEUTRAL, strengths=strengths)
    with pytest.raises(ca.Refused, match="16 wide"):
        ca.directions.steer(model, task, other, NEUTRAL)
    with pytest.raises(ca.Refused, match="a single token"):
        ca.directions.steer(model, task, one, [[5]])
