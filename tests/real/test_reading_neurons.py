"""Neurons of SmolLM2 on capitals: what dominant sub-updates promote, and neurons chosen on some countries on others.

Nothing is tuned, and what does not come out is written down as it is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cutaway as ca
from cutaway.core.stats import generator
from cutaway.neurons import memories
from cutaway.neurons.contributions import Answers, Steps
from tests.real import sets
from tests.real.written import mean, measure

N = 24
DEEP = range(20, 30)  # the attribute is read at 23.4, and what follows it can tell
NEURONS = "neurons"


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_dominant_neurons_promote_the_right_city(model, results):
    """The 10 largest updates of each late layer, chosen without the answer, against the cities of other prompts."""
    bound = sets.task(model, "fact_capital", N).bind(model)
    steps, answers = Steps.of(model, bound.clean, list(DEEP)), Answers(model, bound.answers)
    kinds = list(dict.fromkeys(bound.answers.tolist()))
    own = torch.tensor([kinds.index(a) for a in bound.answers.tolist()])
    cities = answers.rows[kinds]
    given = torch.zeros(len(bound), len(kinds))
    for at, layer in enumerate(DEEP):
        v = memories.toward_logits(model, memories.values(model, layer))
        size = memories.updates(model, steps.coefficient[:, [at]], [layer])[:, 0]
        for p, top in enumerate(size.topk(10).indices):
            given[p] += (steps.weight[p, at, top, None] * v[top]).sum(0) @ cities.T
    prompts, others = torch.arange(len(own)), (len(kinds) - 1)

    def margin(which: torch.Tensor) -> torch.Tensor:
        right = given[prompts, which]
        return right - (given.sum(1) - right) / others

    g = generator(0)
    steps_of = [int(torch.randint(1, len(kinds), (), generator=g)) for _ in range(20)]
    chance = torch.stack([margin((own + k) % len(kinds)).mean() for k in steps_of])
    what = "capital: 10 largest updates of each layer from 20"
    results.row(NEURONS, what, len(bound), **{"right city over others": mean(margin(own), chance)})
    assert float(margin(own).mean()) > float(chance.max())


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_neurons_that_raise_capitals_are_needed_for_other_countries(model, results):
    task = sets.task(model, "fact_capital", 100)
    once = {p.subject: p for p in reversed(task.pairs)}  # each country in one wording
    task = replace(task, pairs=tuple(once.values())[:N])
    assert len({p.subject for p in task.pairs}) == len(task.pairs)
    found = ca.neurons.importance(model, task, sizes=(10, 100), samples=5)
    held = len(task.pairs) // 2
    what = f"capital: {found.labels['neuron'][0]}, chosen on other countries"
    results.row(NEURONS, what, held, score=measure(found.score[0], found.interval[0], found.null[0]))
    for j, size in enumerate(found.labels["size"]):
        parts = {
            f"{way} p": measure(values[0, j], interval[0, j], null[0, j])
            for way, values, interval, null in (
                ("masked", found.masked, found.masked_interval, found.masked_null),
                ("kept", found.kept, found.kept_interval, found.kept_null),
            )
        }
        results.row(
            NEURONS, f"capital: first {size} of 46,080", held, **parts, untouched={"value": float(found.untouched[0])}
        )
    assert float(found.masked[0, 1]) < float(found.masked_null[0, 1].min())
