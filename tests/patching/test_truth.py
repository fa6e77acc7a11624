"""Patching against what is known of the bundled model's world; true of any well-trained set of its weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.models.edits.library import Replace
from cutaway.patching import Effects, activation, group, knockout_curve
from cutaway.tasks.readouts import READOUTS
from cutaway.tasks.task import Task
from tests.conformance import subjects


@cache
def task(name: str, n: int) -> Task:
    """Prompts of the bundled world that the model was trained on."""
    return ca.tasks.load(name, subjects.miniworld(), n, seed=1, split="train")


@pytest.mark.parametrize("i", range(3))
def test_a_fact_enters_at_its_subject_and_leaves_at_the_last_token(i):
    model, one = subjects.miniworld(), Task("fact", task("facts", 3).pairs[i : i + 1])
    bound = one.bind(model)
    subject = [int(p) for p in bound.span("subject")[0].nonzero()]
    changed = [int(p) for p in bound.changed[0].nonzero()]
    assert set(changed) <= set(subject)
    first = activation(model, one, site="resid_pre", samples=1)
    assert [int(p) for p in (first.recovered[0].abs() > 1e-3).nonzero()] == changed
    last = activation(model, one, site="resid_post", samples=1).recovered[-1]
    assert [int(p) for p in (last.abs() > 1e-3).nonzero()] == [len(last) - 1]
    assert float(last[-1]) == pytest.approx(1, abs=1e-3)


def test_facts_have_moved_to_the_last_token_before_the_last_block():
    model, at = subjects.miniworld(), []
    for pair in task("facts", 6).pairs:
        e = activation(model, Task("fact", (pair,)), site="resid_pre", samples=1)
        at.append(float(e.recovered[-1, -1]))
    assert sorted(at)[len(at) // 2] > 0.3, at


@cache
def heads(name: str) -> tuple[Effects, str]:
    """Effects of single heads, and the three that take most away."""
    found = activation(subjects.miniworld(), task(name, 6), site="z", direction="noise", samples=1)
    assert isinstance(found, Effects)
    best = found.effect.reshape(-1).topk(3, largest=False).indices.tolist()
    return found, ",".join(f"{i // found.effect.shape[1]}.{i % found.effect.shape[1]}" for i in best)


@pytest.mark.parametrize("name", ["ioi", "facts"])
def test_heads_found_one_by_one_carry_more_together_than_random_sets(name):
    _, chosen = heads(name)
    got = group(subjects.miniworld(), task(name, 6), heads=chosen, direction="noise", samples=19)
    assert float(got.effect) < float(got.null.min()), "beyond all 19 random sets: p ≤ 0.05"
    assert float(got.recovered) < -0.25
    assert float(got.interval[1]) < 0


def test_all_heads_but_a_few_are_quiet():
    effects = heads("ioi")[0].effect.abs().reshape(-1)
    assert float(effects.median()) < 0.2 * float(effects.max())


def test_the_answer_of_a_fact_is_written_late_and_by_more_than_its_word():
    model = subjects.miniworld()
    parts = ca.lenses.direct_attribution(model, task("facts", 6))
    share = dict(zip(parts.labels["component"], parts.effect.tolist(), strict=True))
    deep = sum(
        v for c, v in share.items() if c.split(".")[-1].isdigit() and int(c.split(".")[1]) >= model.shape.n_layers // 2
    )
    assert deep > 0.5 * float(parts.total.mean())
    assert float(parts.total.min()) > 0
    curve = ca.lenses.logit_lens(model, task("facts", 6))
    assert curve.rank[-1] == 0
    assert curve.rank[0] > 0
    assert bool(torch.all(curve.null < 0.3))


@pytest.mark.parametrize("name", ["facts", "ioi", "arithmetic", "induction"])
def test_the_found_heads_are_needed_and_random_ones_are_not(name):
    """Ranked on one half of the prompts, removed in the other: the answer goes, and with random sets it stays."""
    curve = knockout_curve(subjects.miniworld(), task(name, 20), top=3, samples=9)
    assert float(curve.accuracy[0]) == 1
    assert float(curve.accuracy[3]) < 0.25
    assert float(curve.accuracy_interval[3, 1]) < 0.7
    assert float(curve.metric[3]) < float(curve.null[3].min()), "beyond all random sets"
    assert float(curve.interval[3, 1]) < float(curve.interval[0, 0])
    if name != "facts":  # there any three heads of the same early layers, which join a name's pieces, cost the answer
        assert float(curve.accuracy_null[3].median()) >= 0.6


def test_a_fact_survives_without_heads_of_anywhere():
    """Beside the three found ones: sets of three others, of whatever layers, by hand."""
    model, facts = subjects.miniworld(), task("facts", 12)
    found = set(knockout_curve(model, facts, top=3, samples=1).labels["step"][1:])
    bound = facts.bind(model)
    donor = model.capture(bound.corrupt, "z")
    others = [a for a in map(str, model.places("z.*.*")) if a not in found]
    accuracy = replace(bound, readout=READOUTS["accuracy"])
    kept = []
    for n in range(9):
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(n))[:3].tolist()
        logits = model.run_last(bound.clean, [Replace(others[i], donor[others[i]]) for i in order])
        kept.append(float(accuracy.metric(logits).mean()))
    assert len(others) == 21
    assert sorted(kept)[4] >= 0.6, kept


@pytest.mark.parametrize(("name", "prompts"), [("arithmetic", 10), ("induction", 5), ("ioi", 10)])
def test_the_mechanism_has_places(name, prompts):
    """Head × position: few cells carry much, the last token among them, and their intervals exclude zero."""
    found = activation(subjects.miniworld(), task(name, prompts), site="z", by="both", samples=1, null_cells=0)
    assert found.grid == ("layer", "head", "position")
    size = found.effect.abs().reshape(-1)
    assert float(size.median()) < 0.02 * float(size.max())
    layer, head, place = (int(i) for i in torch.unravel_index(found.effect.argmax(), found.effect.shape))
    assert float(found.recovered[layer, head, place]) > 0.25
    assert float(found.interval[layer, head, place, 0]) > 0
    assert float(found.effect[layer, head, place]) > float(found.null[layer, head, place].max())
    assert float(found.recovered[:, :, -1].max()) > 0.1, "the answer is said at the last token"
