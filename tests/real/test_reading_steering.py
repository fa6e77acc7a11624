"""Steering of a real model: sentiment by dose and response, and register in text that a reader can see.

The ten openings and their strength, ±1 (the classes' means are one length apart), were fixed before anything was
measured on them; the layer and the strengths had been tried before, on other prompts. No slope of sentiment is shown:
its interval holds 0.
"""

from __future__ import annotations

import pytest

import cutaway as ca
from cutaway.tasks import read_labelled
from tests.real import sets
from tests.real.written import measure

DOSE = "steering by strength"
WRITTEN = "steered text"
EXAMPLES = "steered text, ten examples"
SITE = "resid_post.13"

pytestmark = pytest.mark.parametrize("name", ["smollm2"], indirect=True)


def direction(model: ca.Model, what: str) -> ca.directions.Direction:
    """The difference of means over tokens of a property's texts."""
    texts = read_labelled(sets.FOLDER / "labelled" / f"{what}.jsonl", model)
    options = {"finders": ("mean_difference",), "readings": ("mean",), "samples": 1}
    found = ca.directions.find(model, texts, sites=(SITE,), **options)
    sign = 1.0 if found.concept in ("positive", "formal") else -1.0
    return ca.directions.direction({SITE: sign * found.vector[0, 0, 0]}, what, family=found.family)


def test_strength_0_changes_nothing_and_strong_steering_costs_perplexity(model, results):
    task = sets.task(model, "sentiment", 16)
    turned = [p if p.answer.strip() == "positive" else type(p)(p.clean, p.corrupt, p.foil, p.answer) for p in task]
    asked = ca.Task("verdict", tuple(turned))
    neutral = [row["text"] for row in sets.rows("passages")[:2]]
    strengths = (-4.0, -2.0, 0.0, 2.0, 4.0)
    said = "What a wonderful, brilliant day. "
    found = ca.directions.steer(model, asked, direction(model, "sentiment"), neutral, strengths=strengths, samples=4,
                                instruction=said)  # fmt: skip
    n = len(asked)
    for i, s in enumerate(strengths):
        cost = measure(found.perplexity[i], found.perplexity_interval[i], found.perplexity_null[i])
        results.row(DOSE, f"sentiment, strength {s:g}", n, effect=measure(found.effect[i], found.interval[i],
                    found.null[i]), perplexity=cost)  # fmt: skip
    slope = measure(found.mean_slope, found.mean_slope_interval, found.mean_slope_null)
    wrong = measure(found.anti_steerable, found.anti_steerable_interval, found.anti_steerable_null)
    results.row(DOSE, "sentiment, slope of each prompt", n, effect=slope, **{"anti-steerable": wrong})
    results.row(DOSE, f"an instruction: “{said.strip()}”", n, effect=measure(found.prompted, found.prompted_interval))
    assert (float(found.effect[2]), float(found.perplexity[2])) == (0.0, 1.0)
    assert float(found.perplexity[[0, 4]].min()) > 1.0


def test_all_openings_are_written_out_and_steered_ones_differ(model, results):
    prompts = [row["text"] for row in sets.rows("openings")]
    said = "Dear Sir or Madam, I should be most grateful for your kind attention. "
    found = ca.directions.complete(model, direction(model, "register"), prompts, strengths=(-1.0, 1.0), new_tokens=14,
                                   samples=2, instruction=said)  # fmt: skip
    for i, way in enumerate(found.labels["way"]):
        chance = found.null[i] if way in ("-1", "1") else None
        nats = measure(found.loss[i], found.interval[i], chance)
        along = measure(found.component[i], found.component_interval[i], None if chance is None else
                        found.component_null[i])  # fmt: skip
        results.row(WRITTEN, f"register, {way}", len(prompts), loss=nats, component=along,
                    repeated=measure(found.repeated[i], found.repeated_interval[i]))  # fmt: skip
    ways = ("-1", "plain", "1", "random")
    for i, prompt in enumerate(prompts):
        shown = " / ".join(f"{way}: “{' '.join(found.texts(way)[i].split())}”" for way in ways)
        own = {w: {"value": float(found.each[i, j])} for j, w in enumerate(("plain", "−1", "+1"))}
        results.row(EXAMPLES, f"{i + 1}. {prompt} … {shown}".replace("|", "¦"), 1, **own)
    assert [t.strip() for t in found.texts("1")] != [t.strip() for t in found.texts("plain")]
